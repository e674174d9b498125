"""A weight in which every value of rank n and above is zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .groups import device_of
from .targets import CompileCase

BLOCK_ROWS = 16
BLOCK_COLUMNS = 128


@triton.jit(do_not_specialize=["n"])
def nm_keep_kernel(
    weight_ptr,
    rank_ptr,
    out_ptr,
    n,
    rows,
    columns,
    weight_stride_row,
    weight_stride_column,
    rank_stride_row,
    rank_stride_column,
    out_stride_row,
    out_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    live = (row < rows) & (column < columns)
    row = row.to(tl.int64)
    column = column.to(tl.int64)
    rank = tl.load(rank_ptr + row * rank_stride_row + column * rank_stride_column, mask=live, other=0)
    weight = tl.load(weight_ptr + row * weight_stride_row + column * weight_stride_column, mask=live, other=0.0)
    kept = tl.where(rank.to(tl.int32) < n, weight, 0.0).to(weight.dtype)
    tl.store(out_ptr + row * out_stride_row + column * out_stride_column, kept, mask=live)


def nm_keep(weight: torch.Tensor, rank: torch.Tensor, n: int, out: torch.Tensor) -> None:
    """Fill ``out [R, K]`` with ``weight`` where ``rank < n`` and zero elsewhere; any strides."""
    if out.stride(1) != 1 and out.stride(0) == 1:
        # GPT-2's transposed weights: process them in the order of memory
        weight, rank, out = weight.t(), rank.t(), out.t()
    rows, columns = weight.shape
    with device_of(weight):
        nm_keep_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))](
            weight,
            rank,
            out,
            n,
            rows,
            columns,
            *weight.stride(),
            *rank.stride(),
            *out.stride(),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=4,
        )


def compile_cases() -> Iterator[CompileCase]:
    strides = tuple(f"{name}_stride_row" for name in ("weight", "rank", "out"))
    for dtype in ("bf16", "fp32"):
        yield CompileCase(
            dtype,
            nm_keep_kernel,
            types={
                "weight_ptr": f"*{dtype}",
                "rank_ptr": "*u8",
                "out_ptr": f"*{dtype}",
                **dict.fromkeys(("n", "rows", "columns", *strides), "i32"),
            },
            constants={
                **{f"{name}_stride_column": 1 for name in ("weight", "rank", "out")},
                "BLOCK_ROWS": BLOCK_ROWS,
                "BLOCK_COLUMNS": BLOCK_COLUMNS,
            },
            aligned=("columns", *strides),
        )
