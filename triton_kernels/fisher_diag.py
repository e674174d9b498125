"""Triton: ``acc[o, i] += sum_s (sum_t g[s, t, o] x[s, t, i])^2`` without a gradient in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def fisher_diag_kernel(
    acc_ptr,
    x_ptr,
    g_ptr,
    sequences,
    tokens,
    rows,
    columns,
    x_sequence,
    g_sequence,
    acc_stride_row,
    acc_stride_column,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_R: tl.constexpr,
):
    # Neighbouring programs share GROUP_R row tiles and walk along the columns, so that the tiles of
    # x and g they have in common are still in L2 when the next program asks for them.
    row_tiles = tl.cdiv(rows, BLOCK_R)
    column_tiles = tl.cdiv(columns, BLOCK_K)
    program = tl.program_id(0)
    band = program // (GROUP_R * column_tiles)
    band_rows = tl.minimum(row_tiles - band * GROUP_R, GROUP_R)
    within = program % (GROUP_R * column_tiles)
    r = (band * GROUP_R + within % band_rows) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (within // band_rows) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)

    squares = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for _ in range(sequences):
        g_tile_ptr = g_ptr + t[:, None] * rows + r[None, :]
        x_tile_ptr = x_ptr + t[:, None] * columns + k[None, :]
        gradient = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        for start in range(0, tokens, BLOCK_T):
            live = (t < tokens - start)[:, None]
            g = tl.load(g_tile_ptr, mask=live & (r < rows)[None, :], other=0.0)
            x = tl.load(x_tile_ptr, mask=live & (k < columns)[None, :], other=0.0)
            # "ieee": float32 inputs must not be rounded to TF32 on the way.
            gradient = tl.dot(tl.trans(g), x, gradient, input_precision="ieee")
            g_tile_ptr += BLOCK_T * rows
            x_tile_ptr += BLOCK_T * columns
        squares += gradient * gradient
        g_ptr += g_sequence
        x_ptr += x_sequence

    acc_tile_ptr = acc_ptr + r.to(tl.int64)[:, None] * acc_stride_row + k.to(tl.int64)[None, :] * acc_stride_column
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    tl.store(acc_tile_ptr, tl.load(acc_tile_ptr, mask=inside, other=0.0) + squares, mask=inside)


def tile_sizes(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the gradient and the warps that hold them: 128 x 128 for 16-bit tensor cores, 64 x 64
    for float32, which multiplies on the plain cores and has no registers to spare; never much larger
    than the matrix."""
    widest = 64 if dtype == torch.float32 else 128
    block_r, block_k = (min(widest, max(16, triton.next_power_of_2(size))) for size in (rows, columns))
    block_t = min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(tokens)))
    warps = 8 if block_r * block_k > 64 * 64 else 4
    return {"BLOCK_R": block_r, "BLOCK_K": block_k, "BLOCK_T": block_t, "num_warps": warps, "num_stages": 3}


def fisher_diag_(acc: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
    """Add to ``acc`` float32 ``[R, K]`` (any strides) from x ``[S, T, K]`` and g ``[S, T, R]`` of one dtype."""
    sequences, tokens, columns = x.shape
    rows = g.shape[2]
    x, g = x.contiguous(), g.contiguous()
    tiles = tile_sizes(rows, columns, tokens, x.dtype)
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        # The gradient and the sum of squares are both held: without wgmma, whose operands stay in
        # shared memory, 128 x 128 of each spills.
        tiles["BLOCK_K"] = min(tiles["BLOCK_K"], 64)
    grid = (triton.cdiv(rows, tiles["BLOCK_R"]) * triton.cdiv(columns, tiles["BLOCK_K"]),)
    with torch.cuda.device_of(acc):
        fisher_diag_kernel[grid](
            acc,
            x,
            g,
            sequences,
            tokens,
            rows,
            columns,
            x.stride(0),
            g.stride(0),
            acc.stride(0),
            acc.stride(1),
            GROUP_R=8,
            **tiles,
        )
