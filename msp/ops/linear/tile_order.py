"""The order in which the CUDA kernels of ``nm_linear`` read a packed weight.

Any N:M keeps the same number of every 32 columns, so the order is one of words of 32 columns and knows nothing of M.
A tile of 16 rows x 256 columns is what a warp reads; its lane l has four words, of the rows l // 4 and l // 4 + 8 and
the columns 32 (l % 4) + {0, 128} of the tile. The bitmask of a tile is ``[lane][word]``, 16 bytes a lane. The values of
a lane's words follow each other in chunks of 8, and the values of a tile are ``[chunk][lane][8]``, so that a warp reads
512 consecutive bytes at a time. ``csrc/cuda/nm_tiles.h`` has the same order for the kernels.

It is a permutation: values and bitmask keep shape, dtype and size, and ``from_tiles`` gives the canonical form again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msp.formats.patterns import NMPattern

TILE_ROWS, TILE_COLUMNS = 16, 256
_CHUNK = 8


def has_tiles(pattern: NMPattern, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether a ``[rows, columns]`` weight can lie in tiles; what cannot stays as it is."""
    kept = 32 // pattern.m * pattern.n
    # four words of a lane must fill whole chunks: all but odd N of 32
    whole_chunks = kept % 2 == 0 and 0 < pattern.n < pattern.m
    return whole_chunks and dtype.itemsize == 2 and rows % TILE_ROWS == 0 and columns % TILE_COLUMNS == 0


def to_tiles(values: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical values ``[R, K/M*N]`` and bitmask ``[R, K/8]`` in the order of the tiles, in the same shapes."""
    rows, tiles, chunks = _sizes(values, bitmask)
    # stripe, half, row in half, tile, block, word of the block -> stripe, tile, row in half, word, block, half
    shape, order = (rows // TILE_ROWS, 2, 8, tiles, 2, 4, -1), (0, 3, 2, 5, 4, 1, 6)
    lanes = values.reshape(shape).permute(order).reshape(-1, 32, chunks, _CHUNK)
    return lanes.transpose(1, 2).reshape(rows, -1), bitmask.reshape(shape).permute(order).reshape(rows, -1)


def from_tiles(values: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``to_tiles``."""
    rows, tiles, chunks = _sizes(values, bitmask)
    # stripe, tile, row in half, word, block, half -> stripe, half, row in half, tile, block, word
    shape, order = (rows // TILE_ROWS, tiles, 8, 4, 2, 2, -1), (0, 5, 2, 1, 4, 3, 6)
    lanes = values.reshape(-1, chunks, 32, _CHUNK).transpose(1, 2)
    return (
        lanes.reshape(shape).permute(order).reshape(rows, -1),
        bitmask.reshape(shape).permute(order).reshape(rows, -1),
    )


def _sizes(values: Tensor, bitmask: Tensor) -> tuple[int, int, int]:
    """Rows, tiles across, and chunks of a lane in a tile."""
    rows, tiles = values.shape[0], bitmask.shape[1] // (TILE_COLUMNS // 8)
    return rows, tiles, values.shape[1] * TILE_ROWS // (tiles * 32 * _CHUNK)
