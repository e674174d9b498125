"""``fisher_trace``: the sum of all squared per-sequence gradients of a weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from msp.ops._checks import check_gradient_shapes, check_gradients
from msp.ops._dispatch import Op
from msp.ops._gradients import gradient_tiles
from msp.ops._sums import ordered_sum

TOKEN_TILE = 128


def gram_is_cheaper(tokens: int, rows: int, columns: int) -> bool:
    """Whether the Gram form, the upper triangle of two T x T products, multiplies less than one R x K product."""
    return (tokens + TOKEN_TILE) * (rows + columns) < 2 * rows * columns


def reference(x: Tensor, g: Tensor, gram: bool) -> Tensor:
    trace = torch.zeros((), dtype=torch.float64, device=x.device)
    for inputs, gradients in zip(x.float(), g.float(), strict=True):
        if not gram:
            trace += ordered_sum((gradients.t() @ inputs).square_().double())
            continue
        for start in range(0, len(inputs), TOKEN_TILE):
            rows = slice(start, start + TOKEN_TILE)
            products = (inputs[rows] @ inputs[start:].t()).mul_(gradients[rows] @ gradients[start:].t())
            # The tiles above the diagonal count twice, for their mirror images below it.
            trace += 2 * ordered_sum(products.double()) - ordered_sum(products[:, : len(products)].double())
    return trace.float()


op = Op("fisher_trace", reference)


@op.backend("triton")
def triton(x: Tensor, g: Tensor, gram: bool) -> Tensor:
    from msp.triton_kernels import fisher_trace as kernels

    trace: Tensor = kernels.fisher_trace_gram(x, g) if gram else kernels.fisher_trace_direct(x, g)
    return trace


def _direct(x: Tensor, g: Tensor, gram: bool) -> bool:
    """False for the Gram form: it is two GEMMs and little else, so no kernel is faster than the reference."""
    return not gram


@op.backend("cpu", available=lambda: True, supports=_direct)
def cpu(x: Tensor, g: Tensor, gram: bool) -> Tensor:
    trace = torch.zeros((), dtype=torch.float64)
    for _, _, gradient in gradient_tiles(x, g):
        trace += ordered_sum(gradient.square_())
    return trace.float()


@torch.library.custom_op("msp::fisher_trace", mutates_args=())
def fisher_trace_op(x: Tensor, g: Tensor, gram: bool) -> Tensor:
    check_gradient_shapes("fisher_trace", x, g)
    return op(x, g, gram)


@fisher_trace_op.register_fake
def _(x: Tensor, g: Tensor, gram: bool) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=x.device)


def fisher_trace(x: Tensor, g: Tensor, *, form: Literal["direct", "gram"] | None = None) -> Tensor:
    """``sum_s ||sum_t g[s, t] x[s, t]^T||_F^2``: the sum of the terms of ``fisher_diag_``, as a float32 scalar.

    The direct form squares the gradient tile by tile. The Gram form ``sum_{t, t'} (g_t . g_t') (x_t . x_t')``
    never makes the gradient and takes fewer multiplications if T is small against R and K; it is symmetric in t and t',
    so half of it is computed. Results are the same on every run, and on any number of threads.

    Args:
        x: ``[S, T, K]``, float32, float16 or bfloat16.
        g: ``[S, T, R]``, of x's dtype.
        form: which form to use; by default the cheaper one.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: shapes or devices do not match, x or g hold NaN or infinity (the message counts them), or ``form``
            is neither.
    """
    if form not in (None, "direct", "gram"):
        raise ValueError(f"fisher_trace: form is {form!r}, needed is 'direct', 'gram' or None")
    check_gradients("fisher_trace", x, g)
    if not (x.numel() and g.numel()):
        return torch.zeros((), device=x.device)
    gram = gram_is_cheaper(x.shape[1], g.shape[2], x.shape[2]) if form is None else form == "gram"
    # A sum of squares is at least zero, but with cancelling terms rounding can give a negative result.
    trace: Tensor = fisher_trace_op(x, g, gram)
    return trace.clamp_min_(0)
