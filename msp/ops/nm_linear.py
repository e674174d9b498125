"""``y = x W^T + b`` with W in packed form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES, CodedWeight, PackedWeight, unpack, unpack_bits
from msp.formats.positions import check_parts, check_positions
from msp.ops._compiled import compiled_module
from msp.ops._dispatch import Op, define

# On a CPU, few tokens are multiplied by the packed weight as it lies in memory; with more, the time goes into
# arithmetic, and where torch's is faster than ours a few rows at a time are unpacked for its dense product. Measured at
# 4096 x 4096 (docs/cpu.md).
ANY_NUMBER = 1 << 62
FEW_TOKENS = {
    ("amx", torch.bfloat16): 1024,
    ("amx", torch.float32): 48,
    ("avx512", torch.float32): 48,
    ("avx512bf16", torch.bfloat16): ANY_NUMBER,
    ("avx512bf16", torch.float16): ANY_NUMBER,
    ("avx512bf16", torch.float32): ANY_NUMBER,
}
# Of how many bytes of dense rows are made at a time for more tokens than that.
UNPACKED_BYTES = 16 << 20


def few_tokens(dtype: torch.dtype, isa: str) -> int:
    """Up to how many tokens the packed weight wins."""
    return FEW_TOKENS.get((isa, dtype), 16)


def reference(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return F.linear(x, unpack(values, bitmask, x.shape[-1]), bias)


op = Op("nm_linear", reference)


@op.backend("triton")
def triton(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    from msp.triton_kernels import nm_linear as kernels

    if n == m:
        return F.linear(x, values, bias)
    flat = x.reshape(-1, x.shape[-1])
    values, bitmask = values.contiguous(), bitmask.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = kernels.nm_linear(flat, values, bitmask, bias, n=n, group_size=m)
    result: Tensor = y.view(*x.shape[:-1], values.shape[0])
    return result


@op.backend("cpu")
def cpu(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    if n == m:
        return F.linear(x, values, bias)
    compiled = compiled_module("msp._cpu")
    assert compiled is not None
    columns, rows = x.shape[-1], values.shape[0]
    x, tokens = x.contiguous(), x.numel() // columns
    values, bitmask = values.contiguous(), bitmask.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    dtype, threads = VALUE_DTYPES.index(x.dtype), torch.get_num_threads()
    if tokens <= few_tokens(x.dtype, compiled.isa()):
        bias = None if bias is None else bias.contiguous()
        compiled.nm_linear(
            x.data_ptr(),
            values.data_ptr(),
            bitmask.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            dtype,
            tokens,
            rows,
            columns,
            m,
            n,
            threads,
        )
        return y
    flat, some = x.view(-1, columns), max(1, UNPACKED_BYTES // (columns * x.element_size()))
    dense = x.new_empty(min(some, rows), columns)
    for start in range(0, rows, some):
        stop = min(start + some, rows)
        compiled.nm_unpack(
            values[start:].data_ptr(),
            bitmask[start:].data_ptr(),
            dense.data_ptr(),
            dtype,
            stop - start,
            columns,
            m,
            n,
            threads,
        )
        weight = dense[: stop - start]
        part = y.view(-1, rows)[:, start:stop]
        if bias is None:
            torch.mm(flat, weight.t(), out=part)
        else:
            torch.addmm(bias[start:stop], flat, weight.t(), out=part)
    return y


def check(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int) -> None:
    """Raise unless the arguments fit together: a kernel sees only pointers. ``check_positions`` reads the bitmask."""
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {list(x.shape)}, but its last dimension must be {columns}")
    check_parts(values, bitmask, n, m, columns)
    rows, dtype, device = values.shape[0], values.dtype, values.device
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"the packed values are {dtype}, but must be float32, float16 or bfloat16")
    parts = [("x", x)]
    if bias is not None:
        parts.append(("bias", bias))
        if bias.ndim != 1 or bias.shape[0] != rows:
            raise ValueError(f"bias has shape {list(bias.shape)}, but must have [{rows}]")
    for name, tensor in parts:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but the packed values are {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the packed values are on {device}")


def _implementation(
    x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int
) -> Tensor:
    check(x, values, bitmask, bias, n, m, columns)
    check_positions(bitmask, n, m, columns)
    if n == 0 or x.numel() == 0:
        y = x.new_zeros(*x.shape[:-1], values.shape[0])
        return y if bias is None else y + bias
    return op(x, values, bitmask, bias, n, m)


def _fake(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int) -> Tensor:
    check(x, values, bitmask, bias, n, m, columns)
    return x.new_empty(*x.shape[:-1], values.shape[0])


# columns is K, which the parts alone do not tell when n is 0
_ARGUMENTS = "(Tensor x, Tensor values, Tensor bitmask, Tensor? bias, int n, int m, int columns) -> Tensor"
nm_linear_op = define("nm_linear" + _ARGUMENTS, _implementation, _fake)
# An op that autograd knows costs 3 us more a call, also where it has nothing to do.
inference_op = define("nm_linear_inference" + _ARGUMENTS, _implementation, _fake)


def product(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int, columns: int) -> Tensor:
    """``nm_linear`` of the parts of a packed weight."""
    trained = torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    )
    y: Tensor = (nm_linear_op if trained else inference_op)(x, values, bitmask, bias, n, m, columns)
    return y


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


def coded_reference(x: Tensor, packed: CodedWeight, bias: Tensor | None) -> Tensor:
    """Unpack to the dtype of ``x`` and multiply; gradients flow to ``x`` and ``bias``."""
    return F.linear(x, packed.unpack(x.dtype), bias)


def nm_linear(x: Tensor, packed: PackedWeight | CodedWeight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with W in packed form; gradients flow to ``x``, ``bias`` and the kept values that are floats.

    Args:
        x: ``[..., K]``, in the dtype and on the device of ``packed``; any strides. Coded values have no dtype of their
            own, and are multiplied by the reference only.
        packed: a ``[R, K]`` weight. An empty one (N = 0) costs no product. The bits of its bitmask are counted in the
            first call and in the first one after a write to it.
        bias: ``[R]``, same dtype and device.

    Returns:
        ``[..., R]`` in the dtype of ``x``; products are summed in fp32.

    Raises:
        TypeError: dtypes differ.
        ValueError: a shape or device that does not fit.
        UsageError: coded values, and a backend was forced.
        MspError: the parts of ``packed`` do not fit together, or its bitmask keeps another number than N.
    """
    if isinstance(packed, CodedWeight):
        if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
            raise ValueError(f"x has shape {list(x.shape)}, but its last dimension must be {packed.shape[1]}")
        return op.by_reference(coded_reference, x, packed, bias)
    pattern = packed.pattern
    return product(x, packed.values, packed.bitmask, bias, pattern.n, pattern.m, packed.shape[1])
