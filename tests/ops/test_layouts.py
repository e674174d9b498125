"""The tile order: where each value goes, by a walk in plain Python, and back again."""

from __future__ import annotations

import pytest
import torch

from msp.formats.patterns import GROUP_SIZES, NMPattern
from msp.ops import nm_select
from msp.ops.linear.tile_order import from_tiles, has_tiles, to_tiles

PATTERNS = [NMPattern(n, m) for m in GROUP_SIZES for n in range(1, m)]


def walk(values, bitmask, per_word):
    """Tile after tile, chunk after chunk, lane after lane."""
    rows, columns = bitmask.shape[0], bitmask.shape[1] * 8
    tiled_values, tiled_bytes = [], []
    for row, column in ((r, c) for r in range(0, rows, 16) for c in range(0, columns, 256)):
        lanes = []
        for lane in range(32):
            mine = []
            for word in range(4):
                at_row = row + lane // 4 + 8 * (word % 2)
                at_word = (column + 32 * (lane % 4) + 128 * (word // 2)) // 32
                mine += values[at_row, at_word * per_word : (at_word + 1) * per_word].tolist()
                tiled_bytes += bitmask[at_row, 4 * at_word : 4 * at_word + 4].tolist()
            lanes.append(mine)
        for chunk in range(0, len(lanes[0]), 8):
            for mine in lanes:
                tiled_values += mine[chunk : chunk + 8]
    return tiled_values, tiled_bytes


@pytest.mark.parametrize("pattern", ["2:8", "1:8", "3:4", "5:16", "6:32"])
@pytest.mark.parametrize("shape", [(16, 256), (48, 768)], ids=str)
def test_every_value_is_where_the_walk_puts_it(shape, pattern):
    pattern = NMPattern.parse(pattern)
    packed = nm_select(torch.randn(*shape).bfloat16(), pattern)
    numbers = torch.arange(packed.values.numel()).view(packed.values.shape)
    values, bitmask = to_tiles(numbers, packed.bitmask)
    expected_values, expected_bytes = walk(numbers, packed.bitmask, 32 // pattern.m * pattern.n)
    assert values.flatten().tolist() == expected_values and bitmask.flatten().tolist() == expected_bytes
    assert values.shape == numbers.shape and bitmask.shape == packed.bitmask.shape


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_comes_back_to_the_bit(pattern):
    for dtype in (torch.float16, torch.bfloat16):
        if not has_tiles(pattern, 32, 512, dtype):
            continue
        packed = nm_select(torch.randn(32, 512).to(dtype), pattern)
        tiled = to_tiles(packed.values, packed.bitmask)
        assert tiled[0].is_contiguous() and tiled[1].is_contiguous()
        back = from_tiles(*tiled)
        assert torch.equal(back[0], packed.values) and torch.equal(back[1], packed.bitmask)


def test_only_what_fits_has_tiles():
    served = [pattern for pattern in PATTERNS if has_tiles(pattern, 16, 256, torch.float16)]
    assert set(PATTERNS) - set(served) == {NMPattern(n, 32) for n in range(1, 32, 2)}
    two_of_eight = NMPattern(2, 8)
    for rows, columns, dtype in ((8, 256, torch.half), (16, 128, torch.half), (16, 256, torch.float32)):
        assert not has_tiles(two_of_eight, rows, columns, dtype)
    for n in (0, 8):
        assert not has_tiles(NMPattern(n, 8), 16, 256, torch.half)
