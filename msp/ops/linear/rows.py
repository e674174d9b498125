"""``nm_linear`` of a weight in rows, the canonical form: the op, its CPU and its Triton kernels.

``tiles`` adds the CUDA kernels, which read another layout.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import unpack, unpack_bits
from msp.formats.patterns import NMPattern
from msp.formats.positions import Counted, check_positions
from msp.ops._compiled import compiled
from msp.ops._dispatch import Op, define
from msp.ops.linear.checks import check, fake
from msp.ops.linear.compiled import make_struct, struct_of
from msp.ops.linear.layout import Layout, Size
from msp.ops.linear.thresholds import SKINNY_TOKENS, UNPACKED_BYTES, few_tokens


def reference(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, counted: Counted
) -> Tensor:
    return F.linear(x, unpack(values, bitmask, x.shape[-1]), bias)


op = Op("nm_linear", reference)


@op.backend("triton")
def triton(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, counted: Counted) -> Tensor:
    from msp.triton_kernels import nm_linear as kernels

    if n == m:
        return F.linear(x, values, bias)
    flat = x.reshape(-1, x.shape[-1])
    values, bitmask = values.contiguous(), bitmask.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = kernels.nm_linear(flat, values, bitmask, bias, n=n, group_size=m, skinny_tokens=SKINNY_TOKENS)
    result: Tensor = y.view(*x.shape[:-1], values.shape[0])
    return result


@op.backend("cpu")
def cpu(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, counted: Counted) -> Tensor:
    if n == m:
        return F.linear(x, values, bias)
    module, columns, rows = compiled("msp._cpu"), x.shape[-1], values.shape[0]
    x, tokens = x.contiguous(), x.numel() // columns
    values, bitmask = values.contiguous(), bitmask.contiguous()
    y, threads = x.new_empty(*x.shape[:-1], rows), torch.get_num_threads()
    if tokens <= few_tokens(x.dtype, module.isa()):
        weight = struct_of(module.PackedRows, values, bitmask, n, m, columns, counted)
        bias = None if bias is None else bias.contiguous()
        module.nm_linear(weight, x.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), tokens, threads)
        return y
    flat, some = x.view(-1, columns), max(1, UNPACKED_BYTES // (columns * x.element_size()))
    dense = x.new_empty(min(some, rows), columns)
    for start in range(0, rows, some):
        stop = min(start + some, rows)
        weight = make_struct(module.PackedRows, values[start:stop], bitmask[start:stop], n, m, columns)
        module.nm_unpack(weight, dense.data_ptr(), threads)
        part = y.view(-1, rows)[:, start:stop]
        if bias is None:
            torch.mm(flat, dense[: stop - start].t(), out=part)
        else:
            torch.addmm(bias[start:stop], flat, dense[: stop - start].t(), out=part)
    return y


def _implementation(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int
) -> Tensor:
    check(x, values, bitmask, bias, n, m, columns)
    counted = check_positions(bitmask, n, m, columns)
    if n == 0 or x.numel() == 0:
        op.note("reference")
        y = x.new_zeros(*x.shape[:-1], values.shape[0])
        return y if bias is None else y + bias
    return op(x, values, bitmask, bias, n, m, counted)


# columns is K, which the parts alone do not tell when n is 0
_ARGUMENTS = "(Tensor x, Tensor values, Tensor bitmask, Tensor? bias, int n, int m, int columns) -> Tensor"
nm_linear_op = define("nm_linear" + _ARGUMENTS, _implementation, fake)
# An op that autograd knows costs 3 us more a call, also where it has nothing to do.
inference_op = define("nm_linear_inference" + _ARGUMENTS, _implementation, fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bitmask, _, _, _, ctx.columns = inputs
    # activations are kept only where the values themselves are trained
    ctx.save_for_backward(values, bitmask, x if values.requires_grad else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    values, bitmask, x = ctx.saved_tensors
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad[:4]
    flat = grad_y.reshape(-1, grad_y.shape[-1])
    grad_x = grad_values = None
    if needs_x:
        grad_x = grad_y @ unpack(values, bitmask, ctx.columns)
    if needs_values:
        grad_weight = flat.t() @ x.reshape(-1, ctx.columns)
        grad_values = grad_weight[unpack_bits(bitmask, ctx.columns)].view(values.shape)
    return grad_x, grad_values, None, flat.sum(0) if needs_bias else None, None, None, None


torch.library.register_autograd(nm_linear_op, _backward, setup_context=_setup_context)


class Rows(Layout):
    """The canonical form, which every device multiplies by."""

    name: ClassVar[str] = "rows"

    def serves(self, weight: Size) -> bool:
        return True

    def arrange(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        return values, bitmask

    def restore(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        return values, bitmask

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
        trained = torch.is_grad_enabled() and (
            x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
        )
        which = nm_linear_op if trained else inference_op
        y: Tensor = which(x, values, bitmask, bias, pattern.n, pattern.m, columns)
        return y


ROWS = Rows()
