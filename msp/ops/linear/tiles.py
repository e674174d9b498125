"""``nm_linear`` of a weight in tiles, the order of ``tile_order`` that the CUDA kernels read.

``plan`` chooses the kernel of a product. ``SparseLinear`` holds its weight in tiles on a CUDA device. A weight in rows
gets tiles as well, beside the rows, when a product of few tokens first needs them.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import unpack, unpack_bits
from msp.formats.patterns import NMPattern
from msp.formats.positions import Counted, check_compliant, check_positions, version
from msp.ops._compiled import compiled
from msp.ops._dispatch import cuda_serves, define
from msp.ops.linear import fragments, rows
from msp.ops.linear.checks import check, fake
from msp.ops.linear.compiled import make_struct, struct_of
from msp.ops.linear.layout import Layout, Size
from msp.ops.linear.plan import Plan, device_limits, plan
from msp.ops.linear.tile_order import from_tiles, has_tiles, to_tiles


class Weight(NamedTuple):
    """A weight in tiles, as the backends take it."""

    values: Tensor
    bitmask: Tensor
    n: int
    m: int
    compliant: bool
    kept: Tensor | None
    """What ``for_many_tokens`` returned, if it was asked for."""
    counted: Counted


def reference(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return F.linear(x, unpack(*from_tiles(weight.values, weight.bitmask), x.shape[-1]), bias)


op = rows.op.form("tiles", reference)


@op.backend("triton")
def triton(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    in_rows = from_tiles(weight.values, weight.bitmask)
    return rows.triton(x, *in_rows, bias, weight.n, weight.m, weight.counted)


@op.backend(
    "cuda",
    available=lambda: cuda_serves("nm_linear"),
    supports=lambda x, weight, bias: x.dtype.itemsize == 2,
)
def cuda(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    values, bitmask, n, m, compliant, kept, counted = weight
    columns, tokens = x.shape[-1], x.numel() // x.shape[-1]
    chosen = plan(
        tokens, values.shape[0], columns, NMPattern(n, m), compliant, device_limits(x.device), kept is not None
    )
    if chosen.how in ("gather", "expand"):
        struct = struct_of(compiled("msp._cuda").TiledWeight, values, bitmask, n, m, columns, counted)
        return few_tokens(x, struct, values.shape[0], bias, chosen)
    if kept is None:
        return _many_tokens(x, *from_tiles(values, bitmask), bias, n, m, chosen)
    if chosen.how == "spmm":
        return fragments.multiply(x, kept, bias, values.shape[0])
    return F.linear(x, kept, bias)


def _lies_in_tiles(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, counted: Counted
) -> bool:
    return has_tiles(NMPattern(n, m), values.shape[0], x.shape[-1], values.dtype)


@rows.op.backend("cuda", available=lambda: cuda_serves("nm_linear"), supports=_lies_in_tiles)
def cuda_of_rows(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, counted: Counted
) -> Tensor:
    """The kernels for few tokens read tiles, those for many start from rows, so only the former need a copy.

    Values that are trained would need another copy in each call, so they are unpacked instead.
    """
    columns, tokens, pattern = x.shape[-1], x.numel() // x.shape[-1], NMPattern(n, m)
    chosen = plan(tokens, values.shape[0], columns, pattern, pattern.always_compliant, device_limits(x.device))
    if chosen.how not in ("gather", "expand") or values.requires_grad:
        return _many_tokens(x, values, bitmask, bias, n, m, chosen)
    tiles = Tiles.of_rows(values, bitmask, n, m, columns, counted)
    return few_tokens(x, tiles.struct, values.shape[0], bias, chosen)


class Tiles:
    """A copy of a weight in tiles, for as long as its values stay as they are."""

    def __init__(self, values: Tensor, bitmask: Tensor, n: int, m: int, columns: int) -> None:
        self.values = weakref.ref(values)
        self.mark = version(values), values.data_ptr()
        self.parts = to_tiles(values, bitmask)
        self.struct = make_struct(compiled("msp._cuda").TiledWeight, *self.parts, n, m, columns)

    def are_of(self, values: Tensor) -> bool:
        # another tensor may have come to the address when the one that was copied had gone
        return self.values() is values and self.mark == (version(values), values.data_ptr())

    @classmethod
    def of_rows(cls, values: Tensor, bitmask: Tensor, n: int, m: int, columns: int, counted: Counted) -> Tiles:
        """Those that ``counted`` remembers, or new ones."""
        found: Tiles | None = counted.derived.get("tiles")
        if found is not None and found.are_of(values):
            return found
        made, derived = cls(values, bitmask, n, m, columns), counted.derived

        def forget(of: weakref.ref[Tensor]) -> None:
            remembered = derived.get("tiles")
            if remembered is not None and remembered.values is of:
                del derived["tiles"]

        # torch counts no writes to tensors of inference mode, and memory that is allocated while a CUDA graph is
        # captured belongs to the graph
        if not values.is_inference() and not (values.is_cuda and torch.cuda.is_current_stream_capturing()):
            made.values = weakref.ref(values, forget)
            derived["tiles"] = made
        return made


@functools.cache
def cut_of(kind: Any, chosen: Plan) -> Any:
    """The plan as ``msp._cuda`` takes it; ``kind`` is its ``LinearCut``."""
    return kind(form=chosen.how, tokens_at_once=chosen.tokens_at_once, stripes=chosen.stripes, splits=chosen.splits)


def few_tokens(x: Tensor, weight: Any, rows: int, bias: Tensor | None, chosen: Plan) -> Tensor:
    """The product that gathers or expands; ``weight`` is a ``TiledWeight``."""
    flat = flattened(x)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    partials = partial_sums(flat, rows, chosen)
    module = compiled("msp._cuda")
    with torch.cuda.device(x.device):
        module.nm_linear(
            weight,
            cut_of(module.LinearCut, chosen),
            flat.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            0 if partials is None else partials.data_ptr(),
            flat.shape[0],
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


def _many_tokens(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, chosen: Plan
) -> Tensor:
    """From rows, in the order of sparse tensor cores or unpacked, made for this product alone."""
    columns = x.shape[-1]
    if chosen.how == "spmm":
        return fragments.multiply(
            x, fragments.pack(values, bitmask, columns, n, m, checked=True), bias, values.shape[0]
        )
    from msp.triton_kernels import nm_linear as kernels

    dense = values.new_empty(values.shape[0], columns)
    values, bitmask = values.contiguous(), bitmask.contiguous()
    return F.linear(x, kernels.unpack(values, bitmask, dense, n=n, group_size=m), bias)


def check_tiles(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int
) -> Counted:
    """Raise unless the parts of a weight in tiles fit together, are counted, and lie as the kernels read them."""
    check(x, values, bitmask, bias, n, m, columns)
    if not has_tiles(NMPattern(n, m), values.shape[0], columns, torch.float16):
        raise ValueError(f"a weight {n}:{m} of {values.shape[0]} x {columns} does not lie in tiles")
    for name, tensor in (("values", values), ("bitmask", bitmask)):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{name} in tiles must be contiguous and begin at a multiple of 16 bytes")
    return check_positions(bitmask, n, m, columns)


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
    counted = check_tiles(x, values, bitmask, bias, n, m, columns)
    if kept is not None and not kept.is_contiguous():
        raise ValueError("what is kept for many tokens must be contiguous")
    if compliant:
        check_compliant(bitmask, n, m)
    if x.numel() == 0:
        op.note("reference")
        return x.new_zeros(*x.shape[:-1], values.shape[0])
    return op(x, Weight(values, bitmask, n, m, compliant, kept, counted), bias)


tiles_op = define(
    "nm_linear_tiles(Tensor x, Tensor values, Tensor bitmask, Tensor? bias, int n, int m, int columns, bool compliant, "
    "Tensor? kept=None) -> Tensor",
    _implementation,
    fake,
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


torch.library.register_autograd(tiles_op, _backward, setup_context=_setup_context)


class InTiles(Layout):
    """The order that the CUDA kernels for few tokens read; same shapes, dtypes and sizes as in rows."""

    name: ClassVar[str] = "tiles"

    def serves(self, weight: Size) -> bool:
        fits = has_tiles(weight.pattern, weight.rows, weight.columns, weight.dtype)
        return fits and weight.device.type == "cuda" and cuda_serves("nm_linear")

    def arrange(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        return to_tiles(values, bitmask)

    def restore(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        return from_tiles(values, bitmask)

    def product(
        self,
        x: Tensor,
        values: Tensor,
        bitmask: Tensor,
        bias: Tensor | None,
        pattern: NMPattern,
        columns: int,
        compliant: bool = False,
        kept: Tensor | None = None,
    ) -> Tensor:
        # training changes the values, and the kept form would be stale
        if kept is not None and values.requires_grad:
            kept = None
        y: Tensor = tiles_op(x, values, bitmask, bias, pattern.n, pattern.m, columns, compliant, kept)
        return y

    def for_many_tokens(
        self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int, compliant: bool
    ) -> Tensor:
        """The form of a weight in tiles that a product of many tokens reads; ``product`` takes it as ``kept``.

        Returns:
            The fragments for sparse tensor cores, uint8, of a compliant weight; otherwise the dense weight ``[R, K]``.
        """
        values, bitmask = from_tiles(values, bitmask)
        if compliant:
            return fragments.pack(values, bitmask, columns, pattern.n, pattern.m)
        return unpack(values, bitmask, columns)


TILES = InTiles()
