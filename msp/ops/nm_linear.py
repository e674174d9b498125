"""``nm_linear``: a linear layer from its packed weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from msp.ops._dispatch import Op
from msp.ops.packed import PackedWeight, unpack_dense


def reference(x: Tensor, values: Tensor, bitmask: Tensor, n: int, m: int, bias: Tensor | None) -> Tensor:
    return functional.linear(x, unpack_dense(values, bitmask, x.shape[-1]), bias)


op = Op("nm_linear", reference)


@op.backend("triton", supports=lambda x, values, bitmask, n, m, bias: x.numel() > 0 and 0 < n < m)
def triton(x: Tensor, values: Tensor, bitmask: Tensor, n: int, m: int, bias: Tensor | None) -> Tensor:
    from msp.triton_kernels import nm_linear as kernels

    flat = kernels.nm_linear(x.reshape(-1, x.shape[-1]), values, bitmask, bias, n=n, group_size=m)
    return flat.view(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("msp::nm_linear", mutates_args=())
def nm_linear_op(x: Tensor, values: Tensor, bitmask: Tensor, n: int, m: int, bias: Tensor | None) -> Tensor:
    if n == 0 or x.numel() == 0:
        # An empty linear costs no product.
        empty = x.new_zeros(*x.shape[:-1], values.shape[0])
        return empty if bias is None else empty + bias
    return op(x, values, bitmask, n, m, bias)


@nm_linear_op.register_fake
def _(x: Tensor, values: Tensor, bitmask: Tensor, n: int, m: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, values, bitmask, _, _, bias = inputs
    assert isinstance(x, Tensor) and isinstance(values, Tensor) and isinstance(bitmask, Tensor)
    ctx.save_for_backward(values, bitmask)
    ctx.columns = x.shape[-1]  # type: ignore[attr-defined]
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
) -> tuple[Tensor, None, None, None, None, Tensor | None]:
    values, bitmask = ctx.saved_tensors  # type: ignore[attr-defined]
    x_gradient = gradient @ unpack_dense(values, bitmask, ctx.columns)  # type: ignore[attr-defined]
    bias_gradient = gradient.flatten(0, -2).sum(0) if ctx.has_bias else None  # type: ignore[attr-defined]
    return x_gradient, None, None, None, None, bias_gradient


nm_linear_op.register_autograd(_backward, setup_context=_setup)


def nm_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + b`` with W packed. Differentiable in x and b; the packed values are constants.

    Args:
        x: ``[..., K]`` in the dtype of the values.
        packed: a weight ``[R, K]``; its bitmask is trusted (``PackedWeight.check`` looks at it).
        bias: ``[R]`` in the same dtype, or None.

    Returns:
        ``[..., R]``.

    Raises:
        TypeError, ValueError: a dtype or shape does not match.
    """
    rows, columns = packed.shape
    if x.dtype != packed.values.dtype:
        raise TypeError(f"nm_linear: x is {x.dtype}, the packed values {packed.values.dtype}; they must have one dtype")
    if x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(f"nm_linear: x has shape {list(x.shape)}, needed is [..., {columns}]")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(f"nm_linear: bias is {bias.dtype} {list(bias.shape)}, needed is {x.dtype} {[rows]}")
    result: Tensor = nm_linear_op(x, packed.values, packed.bitmask, packed.pattern.n, packed.pattern.m, bias)
    return result
