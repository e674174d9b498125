"""Triton: ``sum_s ||sum_t g[s, t] x[s, t]^T||_F^2``, from the gradient's tiles or from two Gram matrices.

Every program writes one partial sum and the host adds them in a fixed order: float atomics would
give another result on each run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .gradients import (
    ENOUGH_PROGRAMS,
    GROUP_ROWS,
    architecture,
    gradient_cases,
    launch,
    load_tile,
    load_transposed,
    locate_tile,
    product_blocks,
    squared_gradients,
    tile_sizes,
)
from .targets import CompileCase


@triton.jit
def fisher_trace_direct_kernel(
    partial_ptr,
    x_source,
    g_source,
    sequences,
    share,
    tokens,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_R: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of the gradients of ``share`` sequences."""
    tile = locate_tile(rows, columns, BLOCK_R, BLOCK_K, GROUP_R)
    first_sequence = tl.program_id(1) * share
    count = tl.minimum(share, sequences - first_sequence)
    squares = squared_gradients(
        x_source, g_source, first_sequence, count, tile, tokens, rows, columns, BLOCK_R, BLOCK_K, BLOCK_T, True, TMA
    )
    tl.store(partial_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(squares))


@triton.jit
def gram_tile(source, sequence, t, u, tokens, width, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """``a[t:] a[u:]^T``, ``[BLOCK, BLOCK]`` of the Gram matrix of a ``[tokens, width]``; 0 past its end."""
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for column in range(0, width, BLOCK_D):
        left = load_tile(source, sequence, t, column, tokens, width, BLOCK, BLOCK_D, TMA)
        right = load_transposed(source, sequence, u, column, tokens, width, BLOCK, BLOCK_D, TMA)
        product = tl.dot(left, right, product, input_precision="ieee")
    return product


@triton.jit
def fisher_trace_gram_kernel(
    partial_ptr,
    x_source,
    g_source,
    tokens,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TMA: tl.constexpr,
):
    """A ``[BLOCK_R, BLOCK_K]`` tile, both the same, of the upper triangle; steps of BLOCK_T columns of x or g."""
    # Tile p, counted column by column: p = j (j + 1) / 2 + i with i <= j. The root is exact to well under one for
    # any p that fits; the two corrections make j exact.
    side = tl.cdiv(tokens, BLOCK_R)
    tiles = side * (side + 1) // 2
    s = tl.program_id(0) // tiles
    p = tl.program_id(0) - s * tiles
    j = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > p, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= p, j + 1, j)
    i = p - j * (j + 1) // 2

    gram_g = gram_tile(g_source, s, i * BLOCK_R, j * BLOCK_K, tokens, rows, BLOCK_R, BLOCK_T, TMA)
    gram_x = gram_tile(x_source, s, i * BLOCK_R, j * BLOCK_K, tokens, columns, BLOCK_R, BLOCK_T, TMA)
    # A tile above the diagonal also counts for its mirror image.
    weight = tl.where(i == j, 1.0, 2.0)
    tl.store(partial_ptr + tl.program_id(0), weight * tl.sum(gram_g * gram_x))


def fisher_trace_direct(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """x ``[S, T, K]``, g ``[S, T, R]`` of one dtype -> float32 scalar."""
    sequences, tokens, columns = x.shape
    rows = g.shape[2]
    tiles = tile_sizes("direct", x.dtype, architecture(x), rows, columns, tokens, sequences)
    count = triton.cdiv(rows, tiles["BLOCK_R"]) * triton.cdiv(columns, tiles["BLOCK_K"])
    # a program takes as many sequences as possible while there are enough programs
    share = max(1, min(sequences, sequences * count // ENOUGH_PROGRAMS))
    grid = (count, triton.cdiv(sequences, share))
    others = {"sequences": sequences, "share": share, "GROUP_R": GROUP_ROWS}
    return sum_of_programs(fisher_trace_direct_kernel, grid, x, g, tiles, product_blocks, **others)


def gram_tile_sizes(dtype: torch.dtype, arch: int, tokens: int, width: int, sequences: int) -> dict[str, int]:
    """Square tiles, because they form the upper triangle; half of the whole square is computed."""
    tiles = tile_sizes("gram", dtype, arch, tokens, tokens, width, max(1, sequences // 2))
    return {
        **tiles,
        "BLOCK_R": min(tiles["BLOCK_R"], tiles["BLOCK_K"]),
        "BLOCK_K": min(tiles["BLOCK_R"], tiles["BLOCK_K"]),
    }


def fisher_trace_gram(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """x ``[S, T, K]``, g ``[S, T, R]`` of one dtype -> float32 scalar."""
    sequences, tokens, columns = x.shape
    tiles = gram_tile_sizes(x.dtype, architecture(x), tokens, max(g.shape[2], columns), sequences)
    side = triton.cdiv(tokens, tiles["BLOCK_R"])
    # one dimension, since a grid has at most 65,535 in each of the others
    grid = (sequences * (side * (side + 1) // 2),)
    return sum_of_programs(fisher_trace_gram_kernel, grid, x, g, tiles, gram_blocks)


def sum_of_programs(
    kernel: Any, grid: tuple[int, ...], x: torch.Tensor, g: torch.Tensor, *arguments: Any, **others: Any
) -> torch.Tensor:
    """``gradients.launch`` of a kernel whose programs write a partial sum each; their sum, a float32 scalar."""
    partial = torch.empty(grid[::-1], dtype=torch.float32, device=x.device)
    launch(kernel, grid, partial, x, g, *arguments, **others)
    return partial.sum(dtype=torch.float64).float()


def gram_blocks(tiles: dict[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The loads of x and of g in a step of the Gram matrices."""
    block = tiles["BLOCK_R"], tiles["BLOCK_T"]
    return block, block


def compile_cases() -> Iterator[CompileCase]:
    sizes = ("tokens", "rows", "columns")
    yield from gradient_cases(
        fisher_trace_gram_kernel,
        "partial_ptr",
        lambda dtype, arch: gram_tile_sizes(dtype, arch, 2048, 4096, 4),
        gram_blocks,
        numbers=(),
        aligned=sizes,
    )
    yield from gradient_cases(
        fisher_trace_direct_kernel,
        "partial_ptr",
        lambda dtype, arch: tile_sizes("direct", dtype, arch, 4096, 4096, 2048),
        product_blocks,
        numbers=("sequences", "share"),
        aligned=sizes,
        GROUP_R=GROUP_ROWS,
    )
