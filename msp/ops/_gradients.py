"""The gradient of a weight, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 16 MiB: large enough that the GEMM packs its operands only a few times, and small enough to stay in a cache and not to
# be mapped anew for every sequence, which costs as much as the arithmetic of 256 tokens.
TILE_NUMBERS, TILE_COLUMNS = 1 << 22, 4096


def gradient_tiles(x: Tensor, g: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """``g[s].T @ x[s]`` of every sequence in float32, as tiles: rows, columns and their product.

    Args:
        x: ``[S, T, K]``.
        g: ``[S, T, R]``.

    Yields:
        Tiles that share their memory: the next tile overwrites the one before.
    """
    rows, columns = g.shape[2], x.shape[2]
    most = min(rows, TILE_NUMBERS // min(columns, TILE_COLUMNS))
    memory = torch.empty(most * min(columns, TILE_COLUMNS), device=x.device)
    for inputs, gradients in zip(x, g, strict=True):
        inputs, gradients = inputs.float().contiguous(), gradients.float().contiguous()
        for row in range(0, rows, most):
            above = slice(row, min(row + most, rows))
            for column in range(0, columns, TILE_COLUMNS):
                across = slice(column, min(column + TILE_COLUMNS, columns))
                height, width = above.stop - row, across.stop - column
                tile = memory[: height * width].view(height, width)
                torch.mm(gradients[:, above].t(), inputs[:, across], out=tile)
                yield above, across, tile
