"""``y = x W^T + b`` with W packed in the tile order of ``msp.ops.layouts``, which the CUDA kernels read.

``nm_linear_plan`` chooses the kernel of a product. ``SparseLinear`` converts its weight to tiles when it is moved to a
CUDA device; all other code uses the canonical form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES, unpack, unpack_bits
from msp.formats.patterns import NMPattern
from msp.formats.positions import check_compliant, check_positions
from msp.ops._compiled import compiled_module
from msp.ops._dispatch import Op, cuda_serves, define
from msp.ops.layouts import from_tiles, has_tiles, to_tiles
from msp.ops.nm_linear import check
from msp.ops.nm_linear import triton as triton_of_rows
from msp.ops.nm_linear_plan import Plan, device_limits, plan
from msp.ops.nm_spmm import nm_spmm, nm_spmm_packed, pack


def reference(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    compliant: bool,
    kept: Tensor | None,
) -> Tensor:
    return F.linear(x, unpack(*from_tiles(values, bitmask), x.shape[-1]), bias)


op = Op("nm_linear_tiles", reference)


def serves(pattern: NMPattern, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight on this device should lie in tiles."""
    return device.type == "cuda" and has_tiles(pattern, rows, columns, dtype) and cuda_serves("nm_linear")


def for_many_tokens(values: Tensor, bitmask: Tensor, columns: int, pattern: NMPattern, compliant: bool) -> Tensor:
    """The form of a weight in tiles that a product of many tokens reads; a caller may keep it and pass it as ``kept``.

    Returns:
        The fragments for sparse tensor cores, uint8, of a compliant weight; otherwise the dense weight ``[R, K]``.
    """
    rows_values, rows_bitmask = from_tiles(values, bitmask)
    if compliant:
        return pack(rows_values, rows_bitmask, columns, pattern.n, pattern.m)
    return unpack(rows_values, rows_bitmask, columns)


@op.backend("triton")
def triton(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    compliant: bool,
    kept: Tensor | None,
) -> Tensor:
    return triton_of_rows(x, *from_tiles(values, bitmask), bias, n, m)


@op.backend(
    "cuda",
    available=lambda: cuda_serves("nm_linear"),
    supports=lambda x, values, bitmask, bias, n, m, compliant, kept: x.dtype.itemsize == 2,
)
def cuda(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    compliant: bool,
    kept: Tensor | None,
) -> Tensor:
    columns, rows = x.shape[-1], values.shape[0]
    pattern, tokens = NMPattern(n, m), x.numel() // columns
    chosen = plan(tokens, rows, columns, pattern, compliant, device_limits(x.device), kept is not None)
    if chosen.how == "spmm":
        if kept is not None:
            return nm_spmm_packed(x, kept, bias, rows)
        return nm_spmm(x, *from_tiles(values, bitmask), bias, n, m)
    if chosen.how == "unpack":
        return F.linear(x, kept, bias) if kept is not None else _unpacked(x, values, bitmask, bias, n, m)
    return _few_tokens(x, values, bitmask, bias, pattern, chosen)


def _few_tokens(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, pattern: NMPattern, chosen: Plan
) -> Tensor:
    columns, rows = x.shape[-1], values.shape[0]
    flat = flattened(x)
    bias = None if bias is None else bias.contiguous()
    tokens = flat.shape[0]
    y = x.new_empty(*x.shape[:-1], rows)
    partials = partial_sums(flat, rows, chosen)
    compiled = compiled_module("msp._cuda")
    assert compiled is not None
    with torch.cuda.device(x.device):
        compiled.nm_linear(
            flat.data_ptr(),
            values.data_ptr(),
            bitmask.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            0 if partials is None else partials.data_ptr(),
            VALUE_DTYPES.index(x.dtype),
            tokens,
            rows,
            columns,
            pattern.m,
            pattern.n,
            ("gather", "expand").index(chosen.how),
            chosen.tokens_at_once,
            chosen.stripes,
            chosen.splits,
            torch.cuda.current_stream().cuda_stream,
        )
    return y


def flattened(x: Tensor) -> Tensor:
    """``x`` as ``[tokens, K]`` in memory that the kernels can read 16 bytes at a time."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat.clone() if flat.data_ptr() % 16 else flat


def partial_sums(flat: Tensor, rows: int, chosen: Plan) -> Tensor | None:
    """Scratch memory of a product whose columns are split."""
    if chosen.splits == 1:
        return None
    return flat.new_empty(chosen.splits, flat.shape[0], rows, dtype=torch.float32)


def _unpacked(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    from msp.triton_kernels import nm_linear as kernels

    values, bitmask = from_tiles(values, bitmask)
    dense = values.new_empty(values.shape[0], x.shape[-1])
    return F.linear(x, kernels.unpack(values, bitmask, dense, n=n, group_size=m), bias)


def check_tiles(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int) -> None:
    """Raise unless the parts of a weight in tiles fit together, are counted, and lie as the kernels read them."""
    check(x, values, bitmask, bias, n, m, columns)
    if not has_tiles(NMPattern(n, m), values.shape[0], columns, torch.float16):
        raise ValueError(f"a weight {n}:{m} of {values.shape[0]} x {columns} does not lie in tiles")
    for name, tensor in (("values", values), ("bitmask", bitmask)):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{name} in tiles must be contiguous and begin at a multiple of 16 bytes")
    check_positions(bitmask, n, m, columns)


def _implementation(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    columns: int,
    compliant: bool,
    kept: Tensor | None = None,
) -> Tensor:
    check_tiles(x, values, bitmask, bias, n, m, columns)
    if kept is not None and not kept.is_contiguous():
        raise ValueError("what is kept for many tokens must be contiguous")
    if compliant:
        check_compliant(bitmask, n, m)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], values.shape[0])
    return op(x, values, bitmask, bias, n, m, compliant, kept)


def _fake(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    columns: int,
    compliant: bool,
    kept: Tensor | None = None,
) -> Tensor:
    check(x, values, bitmask, bias, n, m, columns)
    return x.new_empty(*x.shape[:-1], values.shape[0])


nm_linear_tiles = define(
    "nm_linear_tiles(Tensor x, Tensor values, Tensor bitmask, Tensor? bias, int n, int m, int columns, bool compliant, "
    "Tensor? kept=None) -> Tensor",
    _implementation,
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bitmask, ctx.columns = *inputs[:3], inputs[6]
    ctx.save_for_backward(values, bitmask, x if values.requires_grad else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    values, bitmask, x = ctx.saved_tensors
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad[:4]
    flat = grad_y.reshape(-1, grad_y.shape[-1])
    rows_values, rows_bitmask = from_tiles(values, bitmask)
    grad_x = grad_values = None
    if needs_x:
        grad_x = grad_y @ unpack(rows_values, rows_bitmask, ctx.columns)
    if needs_values:
        kept = (flat.t() @ x.reshape(-1, ctx.columns))[unpack_bits(rows_bitmask, ctx.columns)]
        grad_values = to_tiles(kept.view(values.shape), rows_bitmask)[0]
    return grad_x, grad_values, None, flat.sum(0) if needs_bias else None, None, None, None, None, None


torch.library.register_autograd(nm_linear_tiles, _backward, setup_context=_setup_context)
