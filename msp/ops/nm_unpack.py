"""The dense form of a packed weight, written into memory that can be reused."""

from __future__ import annotations

import torch
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES, PackedWeight, unpack
from msp.formats.positions import Counted, check_parts, check_positions
from msp.ops._compiled import compiled
from msp.ops._dispatch import Op
from msp.ops.linear.compiled import struct_of


def reference(values: Tensor, bitmask: Tensor, n: int, m: int, out: Tensor, counted: Counted) -> None:
    out.copy_(unpack(values, bitmask, out.shape[1]))


op = Op("nm_unpack", reference)


def _in_one_piece(values: Tensor, bitmask: Tensor, n: int, m: int, out: Tensor, counted: Counted) -> bool:
    """Whether ``out`` is contiguous, as the kernels need."""
    return out.is_contiguous()


@op.backend("triton", supports=_in_one_piece)
def triton(values: Tensor, bitmask: Tensor, n: int, m: int, out: Tensor, counted: Counted) -> None:
    from msp.triton_kernels import nm_linear as kernels

    kernels.unpack(values.contiguous(), bitmask.contiguous(), out, n=n, group_size=m)


@op.backend("cpu", supports=_in_one_piece)
def cpu(values: Tensor, bitmask: Tensor, n: int, m: int, out: Tensor, counted: Counted) -> None:
    module = compiled("msp._cpu")
    values, bitmask = values.contiguous(), bitmask.contiguous()
    weight = struct_of(module.PackedRows, values, bitmask, n, m, out.shape[1], counted)
    module.nm_unpack(weight, out.data_ptr(), torch.get_num_threads())


@torch.library.custom_op("msp::nm_unpack_", mutates_args=("out",))
def nm_unpack_op(values: Tensor, bitmask: Tensor, n: int, m: int, out: Tensor) -> None:
    if out.ndim != 2 or out.dtype not in VALUE_DTYPES:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, but must be a matrix of float32, float16 or bfloat16")
    check_parts(values, bitmask, n, m, out.shape[1])
    if len(out) != len(values) or out.dtype != values.dtype or out.device != values.device:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, but the values are {values.dtype} of {len(values)} "
            f"rows on {values.device}"
        )
    op(values, bitmask, n, m, out, check_positions(bitmask, n, m, out.shape[1]))


@nm_unpack_op.register_fake
def _(values: Tensor, bitmask: Tensor, n: int, m: int, out: Tensor) -> None:
    pass


def nm_unpack(packed: PackedWeight, *, out: Tensor | None = None) -> Tensor:
    """The dense ``[R, K]`` weight, with zeros for the weights that are not kept.

    Args:
        packed: its bitmask is counted in the first call, and in the first call after a write to it.
        out: the tensor to write to, ``[R, K]`` with memory of its own (any strides). A packed weight of another dtype
            or device is converted to those of ``out``. It may be a parameter, whose data is then overwritten.

    Returns:
        ``out``, or a new contiguous tensor like the values.

    Raises:
        TypeError: values cannot have the dtype of ``out``.
        ValueError: ``out`` has another shape, or the parts of the packed weight do not fit together.
    """
    packed.check_once()
    if out is None:
        out = packed.values.new_empty(packed.shape)
    if out.dtype not in VALUE_DTYPES:
        raise TypeError(f"out is {out.dtype}, but must be float32, float16 or bfloat16")
    if out.shape != torch.Size(packed.shape):
        raise ValueError(f"out has shape {list(out.shape)}, but the packed weight has {list(packed.shape)}")
    if packed.pattern.is_empty or not out.numel():
        out.detach().zero_()
        return out
    values, bitmask = packed.values.detach().to(out.device, out.dtype), packed.bitmask.to(out.device)
    nm_unpack_op(values, bitmask, packed.pattern.n, packed.pattern.m, out.detach())
    return out
