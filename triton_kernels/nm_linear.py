"""``y = x W^T + b`` from packed weights: a kernel that never unpacks for few tokens, unpack + GEMM for many."""

# Triton's language has no starred expressions
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from .groups import device_of, grid, join_columns, locate, unit_columns
from .nm_select import WORD_DTYPES
from .targets import CompileCase

# The tokens of a program of the skinny kernel: their accumulators must fit the registers.
TOKENS_PER_PROGRAM = 8
BLOCK_ROWS = 4
BLOCK_GROUPS = 128


@triton.jit
def skinny_kernel(
    x_ptr,
    values_ptr,
    bitmask_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    rows,
    columns,
    stride_token,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """The work is per kept weight: find its column in the bitmask, gather that activation, multiply.

    Threads lie along the groups of a row, so values and bitmask stream in order; the activations are few and stay in
    L1. Sums are kept per thread and reduced once at the end, in a fixed order. With ``max_contiguous`` Triton does not
    load several words or values a thread, which it would have to pass through shared memory to the threads that use
    them.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    groups = columns // GROUP
    words_per_row = tl.cdiv(columns, 8) if GROUP == 4 else groups
    total = tl.zeros([TOKENS, BLOCK_ROWS, BLOCK_GROUPS], tl.float32)
    for first in range(0, groups, BLOCK_GROUPS):
        group = (first + tl.arange(0, BLOCK_GROUPS))[None, :]
        live = (row < rows) & (group < groups)
        live_tokens = live[None, :, :] & (token < tokens)
        if GROUP == 4:
            word = tl.load(bitmask_ptr + row.to(tl.int64) * words_per_row + group // 2, mask=live, other=0)
            word = (word.to(tl.int32) >> (group % 2 * 4)) & 15
        else:
            word_offset = tl.max_contiguous(row.to(tl.int64) * words_per_row + group, [1, 1])
            word = tl.load(bitmask_ptr + word_offset, mask=live, other=0).to(tl.int32)
        slot = tl.max_contiguous(row.to(tl.int64) * groups + group, [1, 1]) * N
        for k in range(N):
            lowest = word & -word
            word = word ^ lowest
            # the exponent of a power of 2 is its bit's number, which is cheaper than counting bits (sign: bit 31)
            place = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
            value = tl.load(values_ptr + slot + k, mask=live, other=0.0).to(tl.float32)
            column = (group * GROUP + place)[None, :, :]
            x = tl.load(x_ptr + token.to(tl.int64) * stride_token + column, mask=live_tokens, other=0.0)
            total += value[None, :, :] * x.to(tl.float32)
    y = tl.sum(total, 2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    live = (row < rows) & (token < tokens)
    tl.store(y_ptr + token.to(tl.int64) * rows + row, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n"])
def unpack_kernel(values_ptr, bitmask_ptr, dense_ptr, rows, columns, n, GROUP: tl.constexpr, UNIT: tl.constexpr):
    row, first_column, unit, live = locate(rows, columns, UNIT)
    word = tl.load(bitmask_ptr + unit, mask=live, other=0).to(tl.int32)
    slot = row.to(tl.int64) * (columns // GROUP * n) + first_column // GROUP * n
    start = row.to(tl.int64) * columns + first_column
    # as many columns at a time as one 16-byte store holds
    PART: tl.constexpr = 128 // dense_ptr.dtype.element_ty.primitive_bitwidth
    for i in tl.static_range(UNIT // PART):
        weights = ()
        for j in tl.static_range(PART):
            bit = (word >> (i * PART + j)) & 1
            weights = weights + (tl.load(values_ptr + slot, mask=bit != 0, other=0.0),)
            slot += bit
        place = i * PART + tl.arange(0, PART)[None, :]
        live_columns = live[:, None] & (first_column[:, None] + place < columns)
        tl.store(dense_ptr + start[:, None] + place, join_columns(weights), mask=live_columns)


def _words(bitmask: torch.Tensor, group_size: int) -> torch.Tensor:
    """The bitmask as one integer per unit, so that a group's bits come with one load."""
    dtype = WORD_DTYPES[unit_columns(group_size)]
    if bitmask.storage_offset() % dtype.itemsize:
        bitmask = bitmask.clone()
    return bitmask.view(dtype)


def unpack(
    values: torch.Tensor, bitmask: torch.Tensor, dense: torch.Tensor, *, n: int, group_size: int
) -> torch.Tensor:
    """Fill and return ``dense [R, K]`` from ``values [R, K/M*N]`` and ``bitmask [R, ceil(K/8)]``."""
    rows, columns = dense.shape
    with device_of(values):
        unpack_kernel[grid(rows, columns, group_size)](
            values,
            _words(bitmask, group_size),
            dense,
            rows,
            columns,
            n,
            GROUP=group_size,
            UNIT=unit_columns(group_size),
            num_warps=4,
        )
    return dense


def nm_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    n: int,
    group_size: int,
    skinny_tokens: int,
) -> torch.Tensor:
    """``[T, K] -> [T, R]`` with T > 0 and 0 < n < group_size; sums in fp32, ``y`` in the dtype of ``x``.

    With more than ``skinny_tokens`` tokens the weight is unpacked once, and tensor cores do the rest.
    """
    tokens, columns = x.shape
    rows = values.shape[0]
    if tokens > skinny_tokens:
        dense = unpack(values, bitmask, values.new_empty(rows, columns), n=n, group_size=group_size)
        return linear(x, dense, bias)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(tokens, rows)
    block_tokens = min(TOKENS_PER_PROGRAM, triton.next_power_of_2(tokens))
    with device_of(x):
        skinny_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(tokens, block_tokens))](
            x,
            values,
            _words(bitmask, group_size),
            bias,
            y,
            tokens,
            rows,
            columns,
            x.stride(0),
            N=n,
            GROUP=group_size,
            TOKENS=block_tokens,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_GROUPS=min(BLOCK_GROUPS, triton.next_power_of_2(columns // group_size)),
            num_warps=4,
        )
    return y


def compile_cases() -> Iterator[CompileCase]:
    words = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}
    for dtype, n, group_size, tokens in (
        ("bf16", 2, 8, 1),
        ("bf16", 2, 8, 8),
        ("fp32", 3, 8, 4),
        ("fp16", 1, 4, 1),
        ("bf16", 16, 32, 8),
    ):
        pointers = {
            "values_ptr": f"*{dtype}",
            "bitmask_ptr": words[WORD_DTYPES[unit_columns(group_size)]],
        }
        yield CompileCase(
            f"{dtype}-{n}:{group_size}-tokens{tokens}",
            skinny_kernel,
            types={
                "x_ptr": f"*{dtype}",
                **pointers,
                "bias_ptr": f"*{dtype}",
                "y_ptr": f"*{dtype}",
                **dict.fromkeys(("tokens", "rows", "columns", "stride_token"), "i32"),
            },
            constants={
                "N": n,
                "GROUP": group_size,
                "TOKENS": tokens,
                "BLOCK_ROWS": BLOCK_ROWS,
                "BLOCK_GROUPS": BLOCK_GROUPS,
            },
            aligned=("rows", "columns", "stride_token"),
        )
        if tokens > 1:
            yield CompileCase(
                f"{dtype}-{n}:{group_size}",
                unpack_kernel,
                types={**pointers, "dense_ptr": f"*{dtype}", **dict.fromkeys(("rows", "columns", "n"), "i32")},
                constants={"GROUP": group_size, "UNIT": unit_columns(group_size)},
                aligned=("columns",),
            )
