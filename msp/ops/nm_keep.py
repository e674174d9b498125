"""``nm_keep``: a weight with everything of rank N and above set to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from msp.ops._dispatch import Op
from msp.ops.packed import DTYPES


def reference(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    torch.where(rank < n, weight, weight.new_zeros(()), out=out)


op = Op("nm_keep", reference)


@op.backend("triton")
def triton(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    from msp.triton_kernels import nm_keep as kernels

    kernels.nm_keep(weight, rank, n, out)


@torch.library.custom_op("msp::nm_keep", mutates_args={"out"})
def nm_keep_op(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    op(weight, rank, n, out)


@nm_keep_op.register_fake
def _(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    return None


def nm_keep(weight: Tensor, rank: Tensor, n: int, *, out: Tensor | None = None) -> Tensor:
    """``weight`` where ``rank < n``, else 0: how a candidate switches a linear to another level.

    Args:
        weight: ``[R, K]``, float32, float16 or bfloat16.
        rank: uint8 ``[R, K]`` from ``nm_rank``.
        n: weights kept per group.
        out: written to if given, like ``weight`` in shape and dtype; it must not overlap ``weight``.

    Returns:
        ``out``, or a new tensor.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not match; n is negative.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"nm_keep: weight is {weight.dtype}, needed is float32, float16 or bfloat16")
    if rank.dtype != torch.uint8:
        raise TypeError(f"nm_keep: rank is {rank.dtype}, needed is torch.uint8")
    if weight.ndim != 2:
        raise ValueError(f"nm_keep: weight has shape {list(weight.shape)}, needed is [R, K]")
    if n < 0:
        raise ValueError(f"nm_keep: n is {n}, needed is 0 or more")
    if out is None:
        out = torch.empty_like(weight)
    for name, tensor in (("rank", rank), ("out", out)):
        if tensor.shape != weight.shape:
            raise ValueError(f"nm_keep: {name} has shape {list(tensor.shape)}, needed is {list(weight.shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"nm_keep: {name} is on {tensor.device}, weight on {weight.device}")
    if out.dtype != weight.dtype:
        raise TypeError(f"nm_keep: out is {out.dtype}, needed is {weight.dtype}")
    if weight.numel():
        nm_keep_op(weight, rank, n, out)
    return out
