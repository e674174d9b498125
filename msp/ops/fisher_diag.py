"""``fisher_diag_``: add the squared gradient of every sequence to an accumulator."""

from __future__ import annotations

import torch
from torch import Tensor

from msp.ops._checks import check_companion, check_gradient_shapes, check_gradients
from msp.ops._dispatch import Op
from msp.ops._gradients import gradient_tiles


def reference(acc: Tensor, x: Tensor, g: Tensor) -> None:
    for inputs, gradients in zip(x.float(), g.float(), strict=True):
        gradient = gradients.t() @ inputs
        acc.addcmul_(gradient, gradient)


op = Op("fisher_diag_", reference)


@op.backend("triton")
def triton(acc: Tensor, x: Tensor, g: Tensor) -> None:
    from msp.triton_kernels import fisher_diag as kernels

    kernels.fisher_diag_(acc, x, g)


@op.backend("cpu", available=lambda: True)
def cpu(acc: Tensor, x: Tensor, g: Tensor) -> None:
    for rows, columns, gradient in gradient_tiles(x, g):
        acc[rows, columns].addcmul_(gradient, gradient)


@torch.library.custom_op("msp::fisher_diag_", mutates_args={"acc"})
def fisher_diag_op(acc: Tensor, x: Tensor, g: Tensor) -> None:
    _check(acc, x, g)
    op(acc, x, g)


@fisher_diag_op.register_fake
def _(acc: Tensor, x: Tensor, g: Tensor) -> None:
    pass


def fisher_diag_(acc: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """``acc[o, i] += sum_s (sum_t g[s, t, o] x[s, t, i])^2``, in place, in float32.

    If x holds the inputs of a linear and g the gradients of its outputs, this adds the squared gradient of its weight,
    one square per sequence: the diagonal of the empirical Fisher matrix.

    Args:
        acc: float32 ``[R, K]``; changed.
        x: ``[S, T, K]``, float32, float16 or bfloat16.
        g: ``[S, T, R]``, of x's dtype.

    Returns:
        ``acc``.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: shapes or devices do not match, or x or g hold NaN or infinity (the message counts them).
    """
    check_gradients("fisher_diag_", x, g)
    _check(acc, x, g)
    if x.numel() and g.numel():
        fisher_diag_op(acc, x, g)
    return acc


def _check(acc: Tensor, x: Tensor, g: Tensor) -> None:
    check_gradient_shapes("fisher_diag_", x, g)
    check_companion("fisher_diag_", "acc", acc, (g.shape[2], x.shape[2]), "x", x)
