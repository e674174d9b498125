"""Shared by the tests of the ops."""

from __future__ import annotations

import warnings

import pytest
import torch

# What kernels are compared with on a GPU must itself be summed in fp32; elsewhere these say nothing.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@pytest.fixture
def poisoned_memory():
    """New uninitialised tensors hold NaN or the largest integer, so what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all() and (torch.empty(4, dtype=torch.uint8) == 255).all()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
