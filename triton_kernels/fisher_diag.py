"""Triton: ``acc[o, i] += sum_s (sum_t g[s, t, o] x[s, t, i])^2`` without a gradient in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .gradients import (
    GROUP_ROWS,
    architecture,
    gradient_cases,
    launch,
    locate_tile,
    product_blocks,
    squared_gradients,
    tile_sizes,
)
from .targets import CompileCase


@triton.jit
def fisher_diag_kernel(
    acc_ptr,
    x_source,
    g_source,
    sequences,
    tokens,
    rows,
    columns,
    acc_stride_row,
    acc_stride_column,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_R: tl.constexpr,
    TMA: tl.constexpr,
):
    tile = locate_tile(rows, columns, BLOCK_R, BLOCK_K, GROUP_R)
    squares = squared_gradients(
        x_source, g_source, 0, sequences, tile, tokens, rows, columns, BLOCK_R, BLOCK_K, BLOCK_T, False, TMA
    )
    first_row, first_column = tile
    r = first_row + tl.arange(0, BLOCK_R)
    k = first_column + tl.arange(0, BLOCK_K)
    acc_tile_ptr = acc_ptr + r.to(tl.int64)[:, None] * acc_stride_row + k.to(tl.int64)[None, :] * acc_stride_column
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    tl.store(acc_tile_ptr, tl.load(acc_tile_ptr, mask=inside, other=0.0) + squares, mask=inside)


def fisher_diag_(acc: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
    """Add to ``acc`` float32 ``[R, K]`` (any strides) from x ``[S, T, K]`` and g ``[S, T, R]`` of one dtype."""
    sequences, tokens, columns = x.shape
    rows = g.shape[2]
    tiles = tile_sizes("diag", x.dtype, architecture(x), rows, columns, tokens)
    grid = (triton.cdiv(rows, tiles["BLOCK_R"]) * triton.cdiv(columns, tiles["BLOCK_K"]),)
    launch(
        fisher_diag_kernel,
        grid,
        acc,
        x,
        g,
        tiles,
        product_blocks,
        sequences=sequences,
        acc_stride_row=acc.stride(0),
        acc_stride_column=acc.stride(1),
        GROUP_R=GROUP_ROWS,
    )


def compile_cases() -> Iterator[CompileCase]:
    return gradient_cases(
        fisher_diag_kernel,
        "acc_ptr",
        lambda dtype, arch: tile_sizes("diag", dtype, arch, 4096, 4096, 2048),
        product_blocks,
        numbers=("sequences",),
        aligned=("tokens", "rows", "columns", "acc_stride_row"),
        acc_stride_column=1,
        GROUP_R=GROUP_ROWS,
    )
