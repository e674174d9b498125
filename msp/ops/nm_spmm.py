"""``y = x W^T + b`` on 2:4 sparse tensor cores, for weights whose aligned groups of 4 keep at most 2.

``nm_linear`` decides when to call it. The packed form stays what a model holds; ``nm_spmm`` brings it into the order of
tensor core fragments for one product, ``pack`` once for many, at 9 bits a weight (16-bit values).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES, count_bits, unpack
from msp.formats.patterns import NMPattern
from msp.formats.positions import check_compliant, check_parts, check_positions
from msp.ops._compiled import compiled_module
from msp.ops._dispatch import Op

SPARSE_DTYPES = (torch.float16, torch.bfloat16)


def is_compliant(bitmask: Tensor, m: int) -> bool:
    """Whether every aligned group of 4 keeps at most 2, so that 2:4 sparse tensor cores can multiply with it.

    Args:
        bitmask: uint8 ``[R, ceil(K/8)]`` of a packed weight.
        m: its group size; fours are aligned with groups only where it is a multiple of 4.
    """
    if m % 4:
        raise ValueError(f"group size {m} is not a multiple of 4")
    return not bool((count_bits(bitmask, 4) > 2).any())


def serves(pattern: NMPattern, dtype: torch.dtype, compliant: bool) -> bool:
    """Whether ``nm_spmm`` can multiply with such a weight; ``compliant`` is what ``is_compliant`` says of it."""
    return dtype in SPARSE_DTYPES and pattern.n > 0 and (pattern.always_compliant or compliant)


def reference(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return F.linear(x, unpack(values, bitmask, x.shape[-1]), bias)


op = Op("nm_spmm", reference)


def _compiled() -> Any:
    compiled = compiled_module("msp._cuda")
    assert compiled is not None
    return compiled


def fragment_bytes(rows: int, columns: int) -> int:
    """Bytes of a ``[rows, columns]`` weight in fragment order, padded to whole tiles."""
    size: int = _compiled().nm_spmm_fragment_bytes(rows, columns)
    return size


def pack(values: Tensor, bitmask: Tensor, columns: int, n: int, m: int, out: Tensor | None = None) -> Tensor:
    """A packed weight in fragment order, for ``nm_spmm_packed``.

    Args:
        values, bitmask: of a compliant ``[R, columns]`` weight that keeps ``n`` of every ``m``, fp16 or bf16, on a GPU.
        out: uint8 of at least ``fragment_bytes(R, columns)``, to be used again for weight after weight.

    Returns:
        ``out``, or a new tensor.
    """
    rows = values.shape[0]
    size = fragment_bytes(rows, columns)
    if values.dtype not in SPARSE_DTYPES:
        raise TypeError(f"values are {values.dtype}, but sparse tensor cores need float16 or bfloat16")
    _check_compliant(values, bitmask, columns, n, m)
    if out is None:
        out = values.new_empty(size, dtype=torch.uint8)
    if out.dtype != torch.uint8 or not out.is_contiguous() or out.numel() < size or out.device != values.device:
        raise ValueError(f"out must be {size} contiguous bytes of uint8 on {values.device}")
    values, bitmask = values.contiguous(), bitmask.contiguous()
    with torch.cuda.device(values.device):
        stream = torch.cuda.current_stream().cuda_stream
        pointers = values.data_ptr(), bitmask.data_ptr(), out.data_ptr()
        _compiled().nm_spmm_pack(*pointers, rows, columns, m, n, stream)
    return out


def _check_compliant(values: Tensor, bitmask: Tensor, columns: int, n: int, m: int) -> None:
    check_parts(values, bitmask, n, m, columns)
    check_positions(bitmask, n, m, columns)
    check_compliant(bitmask, n, m)


def nm_spmm_packed(x: Tensor, fragments: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """``x W^T + b`` with what ``pack`` returned for W.

    Args:
        x: ``[..., K]`` fp16 or bf16, on a GPU; any strides.
        fragments: of a ``[rows, K]`` weight in the dtype of ``x``.
        bias: ``[rows]``, same dtype and device.

    Returns:
        ``[..., rows]`` in the dtype of ``x``; products are summed in fp32.
    """
    columns = x.shape[-1]
    if x.dtype not in SPARSE_DTYPES:
        raise TypeError(f"x is {x.dtype}, but sparse tensor cores need float16 or bfloat16")
    fits = fragments.dtype == torch.uint8 and fragments.is_contiguous()
    if not fits or fragments.numel() < fragment_bytes(rows, columns) or fragments.device != x.device:
        raise ValueError(f"fragments are not those of a [{rows}, {columns}] weight on {x.device}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, but must be {x.dtype} [{rows}] on {x.device}")
    flat = x.reshape(-1, columns)
    # the kernels copy 16 bytes of a row at a time
    if columns % 8:
        flat = F.pad(flat, (0, -columns % 8))
    flat = flat.contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    tokens = flat.shape[0]
    y = x.new_empty(*x.shape[:-1], rows)
    bias = None if bias is None else bias.contiguous()
    compiled = _compiled()
    with torch.cuda.device(x.device):
        workspace = x.new_empty(compiled.nm_spmm_workspace_bytes(tokens, rows, flat.shape[1]), dtype=torch.uint8)
        compiled.nm_spmm(
            flat.data_ptr(),
            fragments.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            workspace.data_ptr(),
            VALUE_DTYPES.index(x.dtype),
            tokens,
            rows,
            flat.shape[1],
            torch.cuda.current_stream().cuda_stream,
        )
    return y


@op.backend("cuda", supports=lambda x, values, bitmask, bias, n, m: x.dtype in SPARSE_DTYPES)
def cuda(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return nm_spmm_packed(x, pack(values, bitmask, x.shape[-1], n, m), bias, values.shape[0])


def nm_spmm(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """``x W^T + b`` with a packed W for which ``serves`` holds.

    Args:
        x: ``[..., K]``, any strides.
        values, bitmask: of a ``[R, K]`` weight that keeps ``n`` of every ``m``.
        bias: ``[R]``.

    Returns:
        ``[..., R]`` in the dtype of ``x``; products are summed in fp32.

    Raises:
        TypeError, ValueError: parts that do not fit together.
        MspError: the bitmask keeps another number than ``n``, or more than 2 of some 4.
    """
    _check_compliant(values, bitmask, x.shape[-1], n, m)
    return op(x, values, bitmask, bias, n, m)
