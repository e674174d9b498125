"""Checks that the Fisher and OBS ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES


def check_gradients(op: str, x: Tensor, g: Tensor) -> None:
    """Raise unless x ``[S, T, K]`` and g ``[S, T, R]`` agree in dtype, device, S and T and are finite."""
    check_gradient_shapes(op, x, g)
    for name, tensor in (("x", x), ("g", g)):
        require_finite(op, name, tensor)


def check_gradient_shapes(op: str, x: Tensor, g: Tensor) -> None:
    """``check_inputs`` without the checks that read values."""
    for name, tensor in (("x", x), ("g", g)):
        if tensor.dtype not in VALUE_DTYPES:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, needed is float32, float16 or bfloat16")
    if x.dtype != g.dtype:
        raise TypeError(f"{op}: x is {x.dtype} and g is {g.dtype}; they must have one dtype")
    if x.ndim != 3 or g.ndim != 3 or x.shape[:2] != g.shape[:2]:
        raise ValueError(f"{op}: x has shape {list(x.shape)} and g {list(g.shape)}, needed are [S, T, K] and [S, T, R]")
    if x.device != g.device:
        raise ValueError(f"{op}: x is on {x.device}, g on {g.device}")


def check_companion(op: str, name: str, tensor: Tensor, shape: tuple[int, int], other: str, beside: Tensor) -> None:
    """Raise unless ``tensor`` is a float32 matrix of ``shape`` on the device of ``beside``, called ``other``."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, needed is torch.float32")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, needed is {list(shape)}")
    if tensor.device != beside.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, {other} on {beside.device}")


def require_finite(op: str, name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` with the count if values of ``tensor`` are NaN or infinite."""
    # The sum is one read without a temporary: if it is finite, no value is NaN or infinite. If it is not finite, it
    # may only have overflowed, so the values are counted.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{op}: {bad} of the {tensor.numel()} values of {name} are NaN or infinite")
