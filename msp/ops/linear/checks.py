"""Checks of the arguments of a product: a kernel sees only pointers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES
from msp.formats.positions import check_parts


def check(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int) -> None:
    """Raise unless the arguments fit together; reads no bit of the bitmask, as ``check_positions`` does.

    Raises:
        TypeError: dtypes differ, or are not those of values and bitmasks.
        ValueError: a shape or device that does not fit.
    """
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {list(x.shape)}, but its last dimension must be {columns}")
    check_parts(values, bitmask, n, m, columns)
    rows, dtype, device = values.shape[0], values.dtype, values.device
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"the packed values are {dtype}, but must be float32, float16 or bfloat16")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != rows):
        raise ValueError(f"bias has shape {list(bias.shape)}, but must have [{rows}]")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but the packed values are {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the packed values are on {device}")


def fake(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int, *unread: Any
) -> Tensor:
    """An empty ``[..., R]`` for tensors without data, after ``check``; the fake of the ops of one weight."""
    check(x, values, bitmask, bias, n, m, columns)
    return x.new_empty(*x.shape[:-1], values.shape[0])
