"""A weight with its n best of every group kept, by ranks that are computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES
from msp.formats.patterns import NMPattern
from msp.ops._compiled import compiled
from msp.ops._dispatch import Op


def reference(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    torch.where(rank < n, weight, weight.new_zeros(()), out=out)


op = Op("nm_keep", reference)


@op.backend("triton")
def triton(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    from msp.triton_kernels import nm_keep as kernels

    kernels.nm_keep(weight, rank, n, out)


def _in_one_piece(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> bool:
    """Whether the kernel can take them: contiguous, and of a dtype that can be packed."""
    contiguous = weight.is_contiguous() and rank.is_contiguous() and out.is_contiguous()
    return contiguous and weight.dtype in VALUE_DTYPES


@op.backend("cpu", supports=_in_one_piece)
def cpu(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    compiled("msp._cpu").nm_keep(
        weight.data_ptr(),
        rank.data_ptr(),
        out.data_ptr(),
        VALUE_DTYPES.index(weight.dtype),
        weight.numel(),
        min(n, 256),
        torch.get_num_threads(),
    )


@torch.library.custom_op("msp::nm_keep", mutates_args=())
def nm_keep_op(weight: Tensor, rank: Tensor, n: int) -> Tensor:
    _check(weight, rank, n, None)
    out = weight.new_empty(weight.shape)
    op(weight, rank, n, out)
    return out


@nm_keep_op.register_fake
def _(weight: Tensor, rank: Tensor, n: int) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.custom_op("msp::nm_keep_", mutates_args=("out",))
def nm_keep_into_op(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    _check(weight, rank, n, out)
    op(weight, rank, n, out)


@nm_keep_into_op.register_fake
def _(weight: Tensor, rank: Tensor, n: int, out: Tensor) -> None:
    pass


def nm_keep(weight: Tensor, rank: Tensor, n: int | NMPattern | str, *, out: Tensor | None = None) -> Tensor:
    """``weight`` where ``rank < n``, zero elsewhere; a candidate switches a linear with it.

    Args:
        weight: ``[R, K]``; any strides.
        rank: uint8 ``[R, K]``, from ``nm_rank``.
        n: the number of kept weights in every group, or a pattern such as ``"2:8"``, of which N counts; 0 gives zeros.
        out: the tensor to write to, with the shape, dtype and device of ``weight`` and memory of its own (any strides).
            It may be a parameter, whose data is then overwritten.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        TypeError: a rank that is not uint8, an ``out`` of another dtype.
        ValueError: shapes or devices that differ, a negative n.
        UsageError: a text that is no pattern.
    """
    if isinstance(n, (NMPattern, str)):
        n = NMPattern.of(n).n
    _check(weight, rank, n, out)
    if out is None:
        kept: Tensor = nm_keep_op(weight.detach(), rank, n)
        return kept
    nm_keep_into_op(weight.detach(), rank, n, out.detach())
    return out


def _check(weight: Tensor, rank: Tensor, n: int, out: Tensor | None) -> None:
    if rank.dtype != torch.uint8:
        raise TypeError(f"rank is {rank.dtype}, but must be uint8")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, but must be a matrix [out, in]")
    if n < 0:
        raise ValueError(f"n is {n}, but must be at least 0")
    if out is not None and out.dtype != weight.dtype:
        raise TypeError(f"out is {out.dtype}, but weight is {weight.dtype}")
    for name, tensor in {"rank": rank, "out": out}.items():
        if tensor is not None and tensor.shape != weight.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but weight has {list(weight.shape)}")
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, but weight is on {weight.device}")
