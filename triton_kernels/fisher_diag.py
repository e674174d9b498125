"""Triton: ``acc[o, i] += sum_s (sum_t g[s, t, o] x[s, t, i])^2`` without a gradient in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .targets import CompileCase


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


GROUP_ROWS = 8
OPTIONS = ("num_warps", "num_stages")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def tile_sizes(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the gradient and the warps that hold them: 128 x 128 for 16-bit tensor cores, 64 x 64
    for float32, which multiplies on the plain cores and has no registers to spare; never much larger
    than the matrix."""
    widest = 64 if dtype == torch.float32 else 128
    block_r, block_k = (min(widest, max(16, triton.next_power_of_2(size))) for size in (rows, columns))
    block_t = min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(tokens)))
    warps = 8 if block_r * block_k > 64 * 64 else 4
    return {"BLOCK_R": block_r, "BLOCK_K": block_k, "BLOCK_T": block_t, "num_warps": warps, "num_stages": 3}


def constants_of(tiles: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in tiles.items() if name not in OPTIONS}


def options_of(tiles: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in tiles.items() if name in OPTIONS}


def narrower(tiles: dict[str, int]) -> dict[str, int]:
    """The tiles for GPUs before Hopper. The gradient and the sum of squares are both held: without wgmma,
    whose operands stay in shared memory, 128 x 128 of each spills."""
    return {**tiles, "BLOCK_K": min(tiles["BLOCK_K"], 64)}


def fisher_diag_(acc: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
    """Add to ``acc`` float32 ``[R, K]`` (any strides) from x ``[S, T, K]`` and g ``[S, T, R]`` of one dtype."""
    sequences, tokens, columns = x.shape
    rows = g.shape[2]
    x, g = x.contiguous(), g.contiguous()
    tiles = tile_sizes(rows, columns, tokens, x.dtype)
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        tiles = narrower(tiles)
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
            GROUP_R=GROUP_ROWS,
            **tiles,
        )


def compile_cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        wide = tile_sizes(4096, 4096, 2048, DTYPES[dtype])
        for tiles, architectures in ((wide, (90, 100)), (narrower(wide), (80,))):
            yield CompileCase(
                name=f"{dtype}-{tiles['BLOCK_R']}x{tiles['BLOCK_K']}",
                kernel=fisher_diag_kernel,
                types={
                    "acc_ptr": "*fp32",
                    "x_ptr": f"*{dtype}",
                    "g_ptr": f"*{dtype}",
                    "sequences": "i32",
                    "tokens": "i32",
                    "rows": "i32",
                    "columns": "i32",
                    "x_sequence": "i32",
                    "g_sequence": "i32",
                    "acc_stride_row": "i32",
                },
                constants={"acc_stride_column": 1, "GROUP_R": GROUP_ROWS} | constants_of(tiles),
                aligned=("tokens", "rows", "columns", "x_sequence", "g_sequence", "acc_stride_row"),
                options=options_of(tiles),
                architectures=architectures,
            )
