"""Every op that takes a pattern takes its text too, and refuses a text that is none."""

from __future__ import annotations

import pytest
import torch

from msp.errors import UsageError
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, nm_keep, nm_linear, nm_rank, nm_select, nm_unpack, obs_prune
from msp.packed.sparse_linear import SparseLinear

WEIGHT = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
RANKS = nm_rank(WEIGHT, 8)
MASK = RANKS < 2


def mask(pattern):
    return PackedWeight.from_mask(WEIGHT, MASK, pattern)


def held(pattern):
    packed = mask(NMPattern(2, 8))
    return PackedWeight(packed.values, packed.bitmask, pattern, packed.shape)


# what each makes of a pattern, as tensors
OPS = {
    "nm_select": lambda pattern: nm_select(WEIGHT, pattern).unpack(),
    "nm_rank": lambda pattern: nm_rank(WEIGHT, pattern),
    "nm_keep": lambda pattern: nm_keep(WEIGHT, RANKS, pattern),
    "obs_prune": lambda pattern: obs_prune(WEIGHT, torch.eye(32), pattern).unpack(),
    "from_mask": lambda pattern: mask(pattern).unpack(),
    "nm_unpack": lambda pattern: nm_unpack(held(pattern)),
    "nm_linear": lambda pattern: nm_linear(WEIGHT, held(pattern)),
    "SparseLinear": lambda pattern: SparseLinear(32, 6, pattern).bitmask,
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


@every_op
@pytest.mark.parametrize("text", ["2:8", " 2 : 8 "])
def test_a_text_is_the_pattern_it_says(op, text):
    assert torch.equal(op(text), op(NMPattern(2, 8)))


@every_op
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2-8", "'2-8' is not a pattern; write N:M with N the number kept, like 2:8"),
        ("", "'' is not a pattern"),
        ("2:6", "group size 6 is not supported"),
        ("9:8", "pattern 9:8 keeps more than its group"),
    ],
)
def test_a_text_that_is_no_pattern_is_refused(op, text, message):
    with pytest.raises(UsageError, match=message):
        op(text)


@pytest.mark.parametrize("wrong", [2.5, None, (2, 8)])
@pytest.mark.parametrize("op", [OPS[name] for name in ("nm_select", "obs_prune", "from_mask", "nm_linear")])
def test_what_is_neither_is_refused(op, wrong):
    with pytest.raises(UsageError, match="is not a pattern; write N:M"):
        op(wrong)


def test_a_packed_weight_holds_the_pattern_itself():
    assert held("2:8").pattern == NMPattern(2, 8) == nm_select(WEIGHT, "2:8").pattern


def test_ranks_and_counts_are_still_numbers():
    assert torch.equal(nm_rank(WEIGHT, "3:8"), RANKS)
    assert torch.equal(nm_keep(WEIGHT, RANKS, 3), nm_keep(WEIGHT, RANKS, "3:8"))
    with pytest.raises(UsageError, match="group size 6 is not supported"):
        nm_rank(WEIGHT, 6)
    with pytest.raises(ValueError, match="n is -1"):
        nm_keep(WEIGHT, RANKS, -1)
