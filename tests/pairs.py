"""A packed model with the dense model that teaches it, and a recovery of it that takes a moment."""

from __future__ import annotations

import copy
from typing import Any

import torch
from families import build, pack, tokens
from torch import Tensor
from transformers import PreTrainedModel

from msp.base.progress import NoProgress
from msp.evidence.evaluate import DenseReference
from msp.models.as_loaded import StoredDtypes
from msp.models.structure import find_structure
from msp.packed.checkpoint import replace_linears
from msp.packed.sparse_linear import SparseLinear
from msp.recovery import LossWeights, Task
from msp.recovery.training import Schedule

METHODS = ("distil", "blockwise", "norms")


def pair(family: str, patterns: tuple[str, ...] = ("2:8", "4:8"), seed: int = 0) -> tuple[Any, PreTrainedModel]:
    """A packed model, and the dense model that it was pruned from."""
    dense = build(family, seed)
    pruned = copy.deepcopy(dense)
    replace_linears(pruned, pack(pruned, patterns))
    return pruned.requires_grad_(False), dense.requires_grad_(False)


def task(student: Any, teacher: Any, **changes: Any) -> Task:
    """A recovery on 16 windows of 16 random tokens, two in a forward, with 8 held-out windows."""
    held_out = tokens(8, 16, 2)
    entries: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "structure": find_structure(teacher),
        "batches": torch.split(tokens(16, 16, 1), 2),
        "held_out": torch.split(held_out, 2),
        "reference": DenseReference(teacher, held_out, batch_size=2),
        "weights": LossWeights(),
        "stored": StoredDtypes.of_model(student),
        "device": torch.device("cpu"),
        "hidden_bytes": 1 << 30,
        "progress": NoProgress(),
    }
    return Task(**{**entries, **changes})


def schedule(epochs: int = 3, accumulate: int = 1, learning_rate: float = 3e-3, measurements: int = 3) -> Schedule:
    return Schedule(epochs, accumulate, learning_rate, measurements, seed=0)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def sparse(model: torch.nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
