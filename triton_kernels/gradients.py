"""Common parts of the Fisher kernels: tiles of x and g, the order of programs, and the sizes of tiles by architecture.

x is ``[S, T, K]`` and g ``[S, T, R]``. If the GPU has a copy engine for tensors (TMA, from Hopper on) and the layout in
memory fits it, a kernel gets descriptors and its threads compute no addresses; otherwise it gets pointers and masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .targets import CompileCase

OPTIONS = ("num_warps", "num_stages")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The number of row tiles that are processed together along the columns, so that reads of neighbouring programs hit L2.
GROUP_ROWS = 8


@triton.jit
def locate_tile(rows, columns, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_R: tl.constexpr):
    """First row and first column of this program's tile."""
    row_tiles = tl.cdiv(rows, BLOCK_R)
    column_tiles = tl.cdiv(columns, BLOCK_K)
    tile = tl.program_id(0)
    band = tile // (GROUP_R * column_tiles)
    band_rows = tl.minimum(row_tiles - band * GROUP_R, GROUP_R)
    within = tile % (GROUP_R * column_tiles)
    return (band * GROUP_R + within % band_rows) * BLOCK_R, (within // band_rows) * BLOCK_K


@triton.jit
def load_tile(
    source, sequence, token, column, tokens, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """``source[sequence, token:, column:]`` of ``[S, T, D]`` as ``[BLOCK_T, BLOCK_D]``, zeros past the end."""
    if TMA:
        return source.load([sequence, token, column]).reshape(BLOCK_T, BLOCK_D)
    else:
        t = tl.arange(0, BLOCK_T)
        d = column + tl.arange(0, BLOCK_D)
        first = (tl.cast(sequence, tl.int64) * tokens + token) * width
        inside = (t < tokens - token)[:, None] & (d < width)[None, :]
        return tl.load(source + first + t[:, None] * width + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_transposed(
    source, sequence, token, column, tokens, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """The same as ``[BLOCK_D, BLOCK_T]``. Without TMA it is loaded transposed: a transpose in registers would need a
    load to registers, outside the pipeline of asynchronous copies."""
    if TMA:
        return tl.trans(load_tile(source, sequence, token, column, tokens, width, BLOCK_T, BLOCK_D, TMA))
    else:
        t = tl.arange(0, BLOCK_T)
        d = column + tl.arange(0, BLOCK_D)
        first = (tl.cast(sequence, tl.int64) * tokens + token) * width
        inside = (d < width)[:, None] & (t < tokens - token)[None, :]
        return tl.load(source + first + t[None, :] * width + d[:, None], mask=inside, other=0.0)


@triton.jit
def squared_gradients(
    x_source,
    g_source,
    first_sequence,
    sequences,
    tile,
    tokens,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUMMED: tl.constexpr,
    TMA: tl.constexpr,
):
    """``sum_s (sum_t g x)^2`` of ``sequences`` sequences, a tile ``[BLOCK_R, BLOCK_K]``; SUMMED: its row sums.

    ``tile`` is its first row and column, from ``locate_tile``.
    One loop over all tokens of all sequences: the next sequence's loads run while this one's gradient is squared. A
    separate loop for each sequence would fill and drain the pipeline each time.
    """
    first_row, first_column = tile
    squares = tl.zeros((BLOCK_R,) if SUMMED else (BLOCK_R, BLOCK_K), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    steps = tl.cdiv(tokens, BLOCK_T)
    for step in range(sequences * steps):
        sequence = first_sequence + step // steps
        token = (step % steps) * BLOCK_T
        g = load_transposed(g_source, sequence, token, first_row, tokens, rows, BLOCK_T, BLOCK_R, TMA)
        x = load_tile(x_source, sequence, token, first_column, tokens, columns, BLOCK_T, BLOCK_K, TMA)
        # "ieee": float32 inputs must not be rounded to TF32.
        gradient = tl.dot(g, x, gradient, input_precision="ieee")
        if token + BLOCK_T >= tokens:
            if SUMMED:
                squares += tl.sum(gradient * gradient, axis=1)
            else:
                squares += gradient * gradient
            gradient = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    return squares


# form -> architecture -> tile of the result, tokens or columns of one step, warps, stages, for 16-bit tensor cores.
# These are the widest tiles that registers and shared memory hold: a step of 128 x 128 reads 32 KB for 2^20
# multiplications, one of 128 x 256 48 KB for twice as many, and on Hopper that traffic from L2 is the limit
# (docs/kernels/fisher.md). "diag" holds the gradient and the sum of squares, "gram" two products, "direct" the gradient
# alone.
TILES = {
    "diag": {80: (128, 64, 64, 8, 3), 90: (128, 128, 64, 8, 4)},
    "direct": {80: (128, 128, 32, 8, 4), 90: (128, 256, 64, 8, 4)},
    "gram": {80: (128, 128, 32, 16, 4), 90: (128, 128, 64, 8, 4)},
}
# float32 multiplies on the plain cores, whose operands come through registers.
FLOAT32_TILES = {"diag": (64, 64, 32, 4, 3), "direct": (64, 64, 32, 4, 3), "gram": (64, 64, 32, 8, 3)}
# Fewer programs leave multiprocessors idle.
ENOUGH_PROGRAMS = 128


def architecture(tensor: torch.Tensor) -> int:
    """The row of ``TILES`` for a tensor's device: 90 if it has Hopper's tensor cores, shared memory and copy engine, or
    more; on the CPU too, so that the interpreter runs the same kernels."""
    if tensor.device.type == "cpu":
        return 90
    if not tensor.is_cuda or torch.version.hip is not None:
        return 80
    # newer chips for data centres; consumer chips have no more shared memory than Ampere's
    return 90 if torch.cuda.get_device_capability(tensor.device)[0] in (9, 10) else 80


def tile_sizes(
    form: str, dtype: torch.dtype, arch: int, height: int, width: int, depth: int, batch: int = 1
) -> dict[str, int]:
    """The tile of a ``[height, width]`` result summed over ``depth``, for ``batch`` results in a launch.

    It is the tile of the table, halved while there are too few tiles for all multiprocessors, and never much larger
    than the result.
    """
    if dtype == torch.float32:
        rows, columns, step, warps, stages = FLOAT32_TILES[form]
    else:
        rows, columns, step, warps, stages = TILES[form][arch]
    while (
        rows * columns > 64 * 64 and batch * triton.cdiv(height, rows) * triton.cdiv(width, columns) < ENOUGH_PROGRAMS
    ):
        rows, columns = (rows, columns // 2) if columns >= rows else (rows // 2, columns)
        warps = 4 if rows * columns <= 64 * 64 else warps
    rows, columns, step = (
        min(block, max(16, triton.next_power_of_2(size)))
        for block, size in zip((rows, columns, step), (height, width, depth), strict=True)
    )
    if rows * columns < 64 * 64:
        warps = 4
    return {"BLOCK_R": rows, "BLOCK_K": columns, "BLOCK_T": step, "num_warps": warps, "num_stages": stages}


def described(x: torch.Tensor, g: torch.Tensor) -> bool:
    """Whether TMA can read both: 16-bit values, addresses and rows in multiples of 16 bytes."""
    if x.dtype == torch.float32 or architecture(x) < 90:
        return False
    return all(tensor.data_ptr() % 16 == 0 and tensor.shape[2] * tensor.itemsize % 16 == 0 for tensor in (x, g))


def source(tensor: torch.Tensor, block: tuple[int, int], tma: bool) -> Any:
    """The arguments of ``load_tile`` for a contiguous ``[S, T, D]``, to load blocks of ``block`` tokens and columns."""
    if not tma:
        return tensor
    _, tokens, width = tensor.shape
    # not the tensor's own strides, which are arbitrary for a size of 1
    return TensorDescriptor(tensor, list(tensor.shape), [tokens * width, width, 1], [1, *block])


Blocks = Callable[[dict[str, int]], tuple[tuple[int, int], tuple[int, int]]]


def product_blocks(tiles: dict[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The loads of x and of g in a step of ``g^T x``."""
    return (tiles["BLOCK_T"], tiles["BLOCK_K"]), (tiles["BLOCK_T"], tiles["BLOCK_R"])


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    result: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor,
    tiles: dict[str, int],
    blocks_of: Blocks,
    **others: Any,
) -> None:
    """Run a kernel that fills ``result`` from x ``[S, T, K]`` and g ``[S, T, R]`` of any strides.

    ``blocks_of`` gives the loads in a step; ``others`` are arguments that only this kernel has.
    """
    x, g = x.contiguous(), g.contiguous()
    tma = described(x, g)
    x_block, g_block = blocks_of(tiles)
    with torch.cuda.device_of(x):
        kernel[grid](
            result,
            source(x, x_block, tma),
            source(g, g_block, tma),
            tokens=x.shape[1],
            rows=g.shape[2],
            columns=x.shape[2],
            TMA=tma,
            **tiles,
            **others,
        )


def gradient_cases(
    kernel: Any,
    result: str,
    tiles_of: Callable[[torch.dtype, int], dict[str, int]],
    blocks_of: Blocks,
    numbers: tuple[str, ...],
    aligned: tuple[str, ...],
    **constants: Any,
) -> Iterator[CompileCase]:
    """A kernel that fills ``result``, on tensor cores with and without TMA and on plain ones.

    ``tiles_of`` takes a dtype and a row of ``TILES``; ``numbers`` and ``aligned`` name the integer arguments.
    """
    for label, tma, arch, architectures in (
        ("bf16", True, 90, (90, 100)),
        ("bf16", False, 80, (80,)),
        ("bf16", False, 90, (90, 100)),
        ("fp32", False, 90, (80, 90, 100)),
    ):
        tiles = tiles_of(DTYPES[label], arch)
        # a descriptor's type names its block
        x_type, g_type = (
            f"tensordesc<{label}[1,{block_t},{block_d}]>" if tma else f"*{label}"
            for block_t, block_d in blocks_of(tiles)
        )
        yield CompileCase(
            name=f"{label}-{tiles['BLOCK_R']}x{tiles['BLOCK_K']}{'-tma' if tma else ''}",
            kernel=kernel,
            types={
                result: "*fp32",
                "x_source": x_type,
                "g_source": g_type,
                **dict.fromkeys((*numbers, *aligned), "i32"),
            },
            constants={"TMA": tma, **constants, **{name: n for name, n in tiles.items() if name not in OPTIONS}},
            aligned=aligned,
            options={name: n for name, n in tiles.items() if name in OPTIONS},
            architectures=architectures,
        )
