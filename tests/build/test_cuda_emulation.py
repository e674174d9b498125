"""The emulation that the CUDA kernels' tests rest on: it computes what it should, and it notices mistakes."""

from __future__ import annotations

import ctypes

import emulated
import numpy as np
import pytest
import torch

NONE, NO_WAIT, PAST_THE_END, MISALIGNED, DEADLOCK, DIVERGED, UNORDERED = range(7)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("emulation_selftest.cpp", tmp_path_factory.mktemp("emulation"))


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_sums_over_a_block(library: ctypes.CDLL, threads: int) -> None:
    x = np.random.default_rng(threads).integers(-9, 9, 2000).astype(np.float32)
    total = np.full(1, np.nan, np.float32)
    found = emulated.call(library.emulated_block_sum, emulated.pointer(x), emulated.pointer(total), x.size, threads)
    assert found == "" and total[0] == x.sum()


def words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy()


def multiply(library, dtype, a, b, metadata=None, mistake=NONE, seed=0):
    d = np.full((16, 8), np.nan, np.float32)
    a, b = words(a), words(b)
    arguments = [emulated.pointer(array) for array in (a, b, metadata, d)]
    found = emulated.call(
        library.emulated_multiply, int(dtype == torch.bfloat16), *arguments, mistake, ctypes.c_uint64(seed)
    )
    return found, torch.from_numpy(d)


def sparse_case(dtype, seed):
    """A 2:4 sparse [16, 32] matrix, dense and as stored, and its metadata as two words for rows r and r + 8."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(16, 8, 4, generator=generator)
    kept = scores.argsort(-1)[..., :2].sort(-1).values
    values = torch.randn(16, 8, 2, generator=generator).to(dtype)
    dense = torch.zeros(16, 8, 4, dtype=dtype).scatter(-1, kept, values).view(16, 32)
    codes = (kept[..., 0] | kept[..., 1] << 2).numpy().astype(np.uint64)
    metadata = np.zeros((8, 2), np.uint32)
    for row in range(16):
        for group in range(8):
            bits = int(codes[row, group]) << (row // 8 * 16 + group % 4 * 4)
            metadata[row % 8, group // 4] |= np.uint32(bits)
    return dense, values.view(16, 16), metadata, torch.randn(8, 32, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensor_core_instructions_multiply(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    for seed in range(3):
        dense, values, metadata, b = sparse_case(dtype, seed)
        expected = dense.double() @ b.double().T
        for a, extra in ((dense, None), (values, metadata)):
            found, d = multiply(library, dtype, a, b, extra, seed=seed)
            assert found == ""
            torch.testing.assert_close(d.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (PAST_THE_END, "cp.async: global access outside of all tensors"),
        (MISALIGNED, "cp.async: misaligned shared address"),
        (DEADLOCK, "deadlock"),
        (DIVERGED, "lanes of a warp are in __"),
        (UNORDERED, "metadata that is not ordered"),
    ],
)
def test_mistakes_stop_the_kernel(library: ctypes.CDLL, mistake: int, message: str) -> None:
    _, values, metadata, b = sparse_case(torch.float16, 0)
    found, _ = multiply(library, torch.float16, values, b, metadata, mistake)
    assert message in found and "thread" in found


@pytest.mark.parametrize("mistake", [NO_WAIT])
def test_missing_synchronisation_shows_as_nan(library: ctypes.CDLL, mistake: int) -> None:
    _, values, metadata, b = sparse_case(torch.float16, 0)
    results = [multiply(library, torch.float16, values, b, metadata, mistake, seed) for seed in range(4)]
    assert any(d.isnan().any() for _, d in results)
