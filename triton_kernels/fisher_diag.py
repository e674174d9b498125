"""Triton: ``acc[o, i] += sum_s (sum_t g[s, t, o] x[s, t, i])^2`` without a gradient in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .gradients import (
    GROUP_ROWS,
    architecture,
    described,
    gradient_cases,
    load_tile,
    load_transposed,
    locate_tile,
    product_blocks,
    source,
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
    first_row, first_column = locate_tile(rows, columns, BLOCK_R, BLOCK_K, GROUP_R)
    squares = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    # One loop over all tokens of all sequences: the next sequence's loads run while this one's gradient is squared. A
    # separate loop for each sequence would fill and drain the pipeline each time.
    steps = tl.cdiv(tokens, BLOCK_T)
    for step in range(sequences * steps):
        sequence = step // steps
        token = (step % steps) * BLOCK_T
        g = load_transposed(g_source, sequence, token, first_row, tokens, rows, BLOCK_T, BLOCK_R, TMA)
        x = load_tile(x_source, sequence, token, first_column, tokens, columns, BLOCK_T, BLOCK_K, TMA)
        # "ieee": float32 inputs must not be rounded to TF32.
        gradient = tl.dot(g, x, gradient, input_precision="ieee")
        if token + BLOCK_T >= tokens:
            squares += gradient * gradient
            gradient = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)

    r = first_row + tl.arange(0, BLOCK_R)
    k = first_column + tl.arange(0, BLOCK_K)
    acc_tile_ptr = acc_ptr + r.to(tl.int64)[:, None] * acc_stride_row + k.to(tl.int64)[None, :] * acc_stride_column
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    tl.store(acc_tile_ptr, tl.load(acc_tile_ptr, mask=inside, other=0.0) + squares, mask=inside)


def fisher_diag_(acc: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
    """Add to ``acc`` float32 ``[R, K]`` (any strides) from x ``[S, T, K]`` and g ``[S, T, R]`` of one dtype."""
    sequences, tokens, columns = x.shape
    rows = g.shape[2]
    x, g = x.contiguous(), g.contiguous()
    tma = described(x, g)
    tiles = tile_sizes("diag", x.dtype, architecture(x), rows, columns, tokens)
    x_block, g_block = product_blocks(tiles)
    grid = (triton.cdiv(rows, tiles["BLOCK_R"]) * triton.cdiv(columns, tiles["BLOCK_K"]),)
    with torch.cuda.device_of(acc):
        fisher_diag_kernel[grid](
            acc,
            source(x, x_block, tma),
            source(g, g_block, tma),
            sequences,
            tokens,
            rows,
            columns,
            acc.stride(0),
            acc.stride(1),
            GROUP_R=GROUP_ROWS,
            TMA=tma,
            **tiles,
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
