"""Triton: ``sum_s ||sum_t g[s, t] x[s, t]^T||_F^2``, from the gradient's tiles or from two Gram matrices.

Every program writes one partial sum and the host adds them in a fixed order: float atomics would
give another result on each run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .fisher_diag import DTYPES, constants_of, options_of, tile_sizes
from .targets import CompileCase


@triton.jit
def fisher_trace_direct_kernel(
    partial_ptr,
    x_ptr,
    g_ptr,
    tokens,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_K)
    tile = tl.program_id(0)
    s = tl.program_id(1)
    r = (tile // column_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (tile % column_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)

    first_token = s.to(tl.int64) * tokens
    g_tile_ptr = g_ptr + first_token * rows + t[:, None] * rows + r[None, :]
    x_tile_ptr = x_ptr + first_token * columns + t[:, None] * columns + k[None, :]
    gradient = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        live = (t < tokens - start)[:, None]
        g = tl.load(g_tile_ptr, mask=live & (r < rows)[None, :], other=0.0)
        x = tl.load(x_tile_ptr, mask=live & (k < columns)[None, :], other=0.0)
        gradient = tl.dot(tl.trans(g), x, gradient, input_precision="ieee")
        g_tile_ptr += BLOCK_T * rows
        x_tile_ptr += BLOCK_T * columns
    tl.store(partial_ptr + s * tl.num_programs(0) + tile, tl.sum(gradient * gradient))


@triton.jit
def gram_tile(a_ptr, tokens, width, t, u, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile ``a[t] a[u]^T`` of a Gram matrix, a ``[tokens, width]``; rows past the end count as 0."""
    d = tl.arange(0, BLOCK_D)
    left_ptr = a_ptr + t.to(tl.int64)[:, None] * width + d[None, :]
    right_ptr = a_ptr + u.to(tl.int64)[:, None] * width + d[None, :]
    product = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        live = (d < width - start)[None, :]
        left = tl.load(left_ptr, mask=(t < tokens)[:, None] & live, other=0.0)
        right = tl.load(right_ptr, mask=(u < tokens)[:, None] & live, other=0.0)
        product = tl.dot(left, tl.trans(right), product, input_precision="ieee")
        left_ptr += BLOCK_D
        right_ptr += BLOCK_D
    return product


@triton.jit
def fisher_trace_gram_kernel(
    partial_ptr,
    x_ptr,
    g_ptr,
    tokens,
    rows,
    columns,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Tile p of the upper triangle, counted column by column: p = j (j + 1) / 2 + i with i <= j. The
    # root is exact to well under one for any p that fits; the two corrections make j exact.
    p = tl.program_id(0)
    s = tl.program_id(1)
    j = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > p, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= p, j + 1, j)
    i = p - j * (j + 1) // 2
    t = i * BLOCK_T + tl.arange(0, BLOCK_T)
    u = j * BLOCK_T + tl.arange(0, BLOCK_T)

    first_token = s.to(tl.int64) * tokens
    gram_g = gram_tile(g_ptr + first_token * rows, tokens, rows, t, u, BLOCK_T, BLOCK_D)
    gram_x = gram_tile(x_ptr + first_token * columns, tokens, columns, t, u, BLOCK_T, BLOCK_D)
    # A tile above the diagonal stands for its mirror image too.
    weight = tl.where(i == j, 1.0, 2.0)
    tl.store(partial_ptr + s * tl.num_programs(0) + p, weight * tl.sum(gram_g * gram_x))


def fisher_trace_direct(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """x ``[S, T, K]``, g ``[S, T, R]`` of one dtype -> float32 scalar."""
    sequences, tokens, columns = x.shape
    rows = g.shape[2]
    tiles = tile_sizes(rows, columns, tokens, x.dtype)
    grid = (triton.cdiv(rows, tiles["BLOCK_R"]) * triton.cdiv(columns, tiles["BLOCK_K"]), sequences)
    partial = torch.empty(grid[::-1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        fisher_trace_direct_kernel[grid](partial, x.contiguous(), g.contiguous(), tokens, rows, columns, **tiles)
    return partial.sum(dtype=torch.float64).float()


def gram_tile_sizes(tokens: int, sequences: int, dtype: torch.dtype) -> dict[str, int]:
    """128-token tiles halve the traffic of 64-token ones, once there are enough of them for every SM."""
    if dtype == torch.float32:
        block_t = min(64, max(16, triton.next_power_of_2(tokens)))
        return {"BLOCK_T": block_t, "BLOCK_D": 32, "num_warps": 8 if block_t == 64 else 4}
    wide = triton.cdiv(tokens, 128)
    if sequences * wide * (wide + 1) // 2 >= 512:
        return {"BLOCK_T": 128, "BLOCK_D": 64, "num_warps": 8}
    return {"BLOCK_T": min(64, max(16, triton.next_power_of_2(tokens))), "BLOCK_D": 64, "num_warps": 4}


def fisher_trace_gram(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """x ``[S, T, K]``, g ``[S, T, R]`` of one dtype -> float32 scalar."""
    sequences, tokens, columns = x.shape
    rows = g.shape[2]
    tiles = gram_tile_sizes(tokens, sequences, x.dtype)
    side = triton.cdiv(tokens, tiles["BLOCK_T"])
    grid = (side * (side + 1) // 2, sequences)
    partial = torch.empty(grid[::-1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        fisher_trace_gram_kernel[grid](partial, x.contiguous(), g.contiguous(), tokens, rows, columns, **tiles)
    return partial.sum(dtype=torch.float64).float()


def compile_cases() -> Iterator[CompileCase]:
    for dtype, sequences in (("bf16", 1), ("bf16", 4), ("fp32", 1)):
        types = {"partial_ptr": "*fp32", "x_ptr": f"*{dtype}", "g_ptr": f"*{dtype}"}
        types |= {"tokens": "i32", "rows": "i32", "columns": "i32"}
        forms = [(fisher_trace_gram_kernel, gram_tile_sizes(2048, sequences, DTYPES[dtype]))]
        if sequences == 1:
            forms.append((fisher_trace_direct_kernel, tile_sizes(4096, 4096, 2048, DTYPES[dtype])))
        for kernel, tiles in forms:
            constants = constants_of(tiles)
            yield CompileCase(
                name="-".join([dtype, *map(str, constants.values())]),
                kernel=kernel,
                types=types,
                constants=constants,
                aligned=("tokens", "rows", "columns"),
                options=options_of(tiles),
            )
