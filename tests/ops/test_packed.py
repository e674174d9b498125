from __future__ import annotations

import dataclasses

import by_hand
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msp.errors import MspError
from msp.formats.packed_weight import count_bits, pack_bits, unpack_bits
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, nm_select

PATTERNS = ["0:4", "1:4", "4:4", "2:8", "0:8", "8:8", "3:8", "5:16", "16:16", "9:32", "32:32"]


def make(pattern, *, rows=5, groups=3, dtype=torch.float32, seed=0):
    """A weight and a random mask that keeps N of every M, whatever the weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = by_hand.weights(rows, groups * pattern.m, dtype, generator)
    mask = torch.rand(rows, groups, pattern.m, generator=generator).argsort(-1) < pattern.n
    return weight, mask.view(weight.shape)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
def test_packs_bit_by_bit_as_the_format_says(text, dtype):
    pattern = NMPattern.parse(text)
    for seed, rows, groups in ((0, 1, 1), (1, 4, 3)):
        weight, mask = make(pattern, rows=rows, groups=groups, dtype=dtype, seed=seed)
        packed = PackedWeight.from_mask(weight, mask, pattern)
        values, bitmask = by_hand.packed(weight, mask.numpy())
        packed.check("w")
        assert packed.values.shape == (rows, groups * pattern.n)
        assert torch.equal(packed.values, values) and torch.equal(packed.bitmask, bitmask)
        assert torch.equal(packed.kept(), mask)
        assert torch.equal(packed.unpack(), weight.masked_fill(~mask, 0))
        assert packed.dtype == dtype and packed.unpack().dtype == dtype
        assert packed.device == weight.device


@pytest.mark.parametrize("text", PATTERNS)
def test_a_weight_without_rows_or_columns_is_packed_too(text):
    pattern = NMPattern.parse(text)
    for rows, columns in ((0, 3 * pattern.m), (2, 0)):
        weight = torch.empty(rows, columns)
        packed = PackedWeight.from_mask(weight, weight.bool(), pattern)
        packed.check()
        assert packed.values.shape == (rows, columns // pattern.m * pattern.n)
        assert packed.bitmask.shape == (rows, -(-columns // 8)) and packed.unpack().shape == (rows, columns)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_bits_go_there_and_back(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    kept = torch.tensor(bits).view(rows, columns)
    bitmask = pack_bits(kept)
    assert torch.equal(bitmask, torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little")))
    assert torch.equal(unpack_bits(bitmask, columns), kept)


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_counts_the_bits_of_every_group(m):
    kept = torch.rand(7, 3 * 32, generator=torch.Generator().manual_seed(m)) < 0.5
    assert torch.equal(count_bits(pack_bits(kept), m), kept.view(7, -1, m).sum(-1).byte())


@pytest.mark.parametrize(
    ("text", "bytes_a_weight"), [("2:4", 1.125), ("4:8", 1.125), ("3:8", 0.875), ("2:8", 0.625), ("1:8", 0.375)]
)
def test_takes_the_bytes_the_format_promises(text, bytes_a_weight):
    pattern = NMPattern.parse(text)
    weight, mask = make(pattern, rows=16, groups=8, dtype=torch.bfloat16)
    assert PackedWeight.from_mask(weight, mask, pattern).nbytes == bytes_a_weight * weight.numel()


def test_keeps_zeros_it_was_told_to_keep():
    packed = PackedWeight.from_mask(torch.zeros(1, 4), torch.tensor([[True, False, True, False]]), NMPattern(2, 4))
    assert packed.kept().tolist() == [[True, False, True, False]]
    assert packed.bitmask.tolist() == [[5]]


def test_moves_between_dtypes_and_devices():
    packed = nm_select(torch.randn(3, 16), NMPattern(2, 8))
    half = packed.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.bitmask.dtype == torch.uint8
    assert torch.equal(half.unpack(), packed.unpack().bfloat16())
    meta = packed.to("meta")
    assert meta.values.is_meta and meta.bitmask.is_meta and meta.dtype == torch.float32
    with pytest.raises(TypeError, match=r"values cannot be torch\.int8"):
        packed.to(dtype=torch.int8)


def test_is_frozen():
    packed = nm_select(torch.randn(3, 16), NMPattern(2, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.pattern = NMPattern(1, 8)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, r"weight is torch\.float64", {"weight": torch.zeros(2, 8).double()}),
        (ValueError, "weight has 12 columns, but must have a multiple of 8", {"weight": torch.zeros(2, 12)}),
        (TypeError, r"mask is torch\.uint8, but must be bool", {"mask": torch.ones(2, 8).byte()}),
        (ValueError, r"mask has shape \[1, 8\], but weight has \[2, 8\]", {"mask": torch.ones(1, 8).bool()}),
        (ValueError, "another number than 2 in 2 of 2 groups", {"mask": torch.ones(2, 8).bool()}),
    ],
)
def test_refuses_masks_that_do_not_fit(error, message, change):
    mask = torch.arange(8).repeat(2, 1) < 2
    arguments = {"weight": torch.zeros(2, 8), "mask": mask, "pattern": NMPattern(2, 8)} | change
    with pytest.raises(error, match=message):
        PackedWeight.from_mask(**arguments)


def corrupt(bitmask, row, byte, bits):
    bitmask = bitmask.clone()
    bitmask[row, byte] ^= bits
    return bitmask


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "3:16", "7:32"])
def test_check_finds_every_flipped_bit(pattern):
    pattern = NMPattern.parse(pattern)
    weight, mask = make(pattern, rows=3, groups=1)
    packed = PackedWeight.from_mask(weight, mask, pattern)
    for column in range(packed.bitmask.shape[1] * 8):
        broken = dataclasses.replace(packed, bitmask=corrupt(packed.bitmask, 1, column // 8, 1 << column % 8))
        if column < pattern.m:
            found = pattern.n + (-1 if mask[1, column] else 1)
            message = f"layer.q.bitmask does not keep {pattern.n} of every {pattern.m} in 1 of 3 groups, "
            message += f"the first in row 1, group 0, which keeps {found}"
        else:
            message = "layer.q.bitmask sets 1 bits past its 4 columns"
        with pytest.raises(MspError, match=message):
            broken.check("layer.q")


def test_check_finds_a_bit_that_moved_to_another_group():
    packed = PackedWeight.from_mask(torch.ones(1, 16), torch.arange(16)[None] % 8 < 2, NMPattern(2, 8))
    moved = dataclasses.replace(packed, bitmask=torch.tensor([[0b111, 0b1]], dtype=torch.uint8))
    with pytest.raises(MspError, match="in 2 of 2 groups"):
        moved.check()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"w\.values has shape \[2, 5\], but 2:8 needs \[2, 4\]", {"values": torch.zeros(2, 5)}),
        (r"w\.values has shape \[8\], but 2:8 needs \[2, 4\]", {"values": torch.zeros(8)}),
        (r"w\.bitmask has shape \[2, 3\], but 2:8 needs \[2, 2\]", {"bitmask": torch.zeros(2, 3).byte()}),
        (r"w\.values are torch\.int8", {"values": torch.zeros(2, 4, dtype=torch.int8)}),
        (r"w\.bitmask is torch\.int32, but must be uint8", {"bitmask": torch.zeros(2, 2).int()}),
        (r"w\.values are on cpu, but bitmask is on meta", {"bitmask": torch.zeros(2, 2, device="meta").byte()}),
        (r"w\.shape 2x20: 20 columns are not a multiple of the group size 8", {"shape": (2, 20)}),
        (r"w\.values has shape \[2, 4\], but 1:8 needs \[2, 2\]", {"pattern": NMPattern(1, 8)}),
    ],
)
def test_check_names_the_part_at_fault(message, change):
    packed = PackedWeight.from_mask(torch.ones(2, 16), torch.arange(16).repeat(2, 1) % 8 < 2, NMPattern(2, 8))
    with pytest.raises(MspError, match=message):
        dataclasses.replace(packed, **change).check("w")
