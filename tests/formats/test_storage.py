"""The table of what a stored linear consists of, against the tensors that ops, modules and files really have."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msp.errors import MspError, UsageError
from msp.formats.patterns import GROUP_SIZES, NMPattern
from msp.formats.storage import DENSE, REMOVED, VALUE_DTYPES, Part, Storage
from msp.ops import nm_select
from msp.packed.sparse_linear import SparseLinear

patterns = st.sampled_from(GROUP_SIZES).flatmap(lambda m: st.builds(NMPattern, st.integers(0, m), st.just(m)))


@pytest.mark.parametrize("text", ["2:8", "0:4", "8:8", "31:32", "dense", "removed"])
def test_what_is_written_is_read(text: str) -> None:
    assert str(Storage.parse(text)) == text == str(Storage.parse(f" {text} "))


@given(pattern=patterns)
def test_every_pattern_is_a_storage(pattern: NMPattern) -> None:
    storage = Storage(pattern)
    assert Storage.parse(str(pattern)) == storage and storage.support == pattern
    assert storage.is_dense == storage.keeps_all == pattern.is_dense and not storage.is_coded
    assert storage.label == ("dense" if pattern.is_dense else str(pattern))


@pytest.mark.parametrize("text", ["", "2:8+", "+2:8", "2:8+2:8", "2:8+dense", "dense+2:8", "2/8", "float", "2:8+float"])
def test_what_is_no_storage_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Storage.parse(text)


@pytest.mark.parametrize(("text", "message"), [("9:8", "keeps more"), ("2:5", "group size 5")])
def test_a_pattern_that_cannot_be_says_why(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Storage.parse(text)


@settings(max_examples=60, deadline=None)
@given(pattern=patterns, rows=st.integers(0, 5), groups=st.integers(0, 5), dtype=st.sampled_from(VALUE_DTYPES))
def test_parts_are_those_of_packed_weights(pattern: NMPattern, rows: int, groups: int, dtype: torch.dtype) -> None:
    """Also columns that are no multiple of 8, whose last byte of the bitmask is padded."""
    columns, storage = groups * pattern.m, Storage(pattern)
    packed = nm_select(torch.randn(rows, columns).to(dtype), pattern)
    found = {"values": packed.values, "bitmask": packed.bitmask}
    table = storage.packed_parts(rows, columns)
    assert {name: (tuple(part.shape), part.dtype) for name, part in found.items()} == {
        name: (part.shape, part.dtype or dtype) for name, part in table.items()
    }
    assert sum(part.nbytes(dtype) for part in table.values()) == packed.nbytes
    assert storage.kept(rows, columns) == packed.values.numel() == int(packed.kept().sum())
    if pattern.is_dense:
        assert storage.parts(rows, columns) == {"weight": Part((rows, columns), None)}
        assert storage.nbytes(rows, columns, dtype) == rows * columns * dtype.itemsize
    else:
        assert storage.parts(rows, columns) == table and storage.nbytes(rows, columns, dtype) == packed.nbytes
        module = SparseLinear.from_packed(packed)
        assert storage.nbytes(rows, columns, dtype) == sum(part.nbytes for part in module.state_dict().values())


def test_bits_a_weight() -> None:
    bits = {"2:8": 5, "4:8": 9, "1:4": 5, "0:8": 1, "8:8": 16, "dense": 16, "removed": 0}
    assert {name: Storage.parse(name).bits_per_weight(3, 64, torch.bfloat16) for name in bits} == bits
    assert Storage.parse("2:8").bits_per_weight(3, 64, torch.float32) == 9
    assert DENSE.bits_per_weight(0, 0, torch.float32) == 0


@given(pattern=patterns, rows=st.integers(1, 9), groups=st.integers(1, 9), dtype=st.sampled_from(VALUE_DTYPES))
def test_bits_are_those_of_values_and_bitmask(pattern: NMPattern, rows: int, groups: int, dtype: torch.dtype) -> None:
    columns = groups * pattern.m
    index = Fraction(0 if pattern.is_dense else 8 * math.ceil(columns / 8), columns)
    expected = pattern.density * 8 * dtype.itemsize + index
    assert Storage(pattern).bits_per_weight(rows, columns, dtype) == pytest.approx(float(expected))


def test_the_corners() -> None:
    assert DENSE.parts(3, 7) == {"weight": Part((3, 7), None)} and DENSE.kept(3, 7) == 21 and DENSE.is_dense
    assert REMOVED.parts(3, 7) == {} and REMOVED.kept(3, 7) == REMOVED.nbytes(3, 7, torch.float32) == 0
    assert not REMOVED.is_dense and not REMOVED.is_coded and not REMOVED.keeps_all
    with pytest.raises(UsageError, match="removed linear has no pattern"):
        Storage(NMPattern(2, 8), None)


def test_columns_that_do_not_fit_are_refused() -> None:
    for asked in (Storage.kept, Storage.parts, Storage.packed_parts):
        for text in ("2:8", "8:8"):
            with pytest.raises(MspError, match="12 columns are not a multiple of the group size 8"):
                asked(Storage.parse(text), 1, 12)


def test_formats_lie_below_the_ops() -> None:
    code = "import sys, msp; before = {*sys.modules}; import msp.formats.storage; print(*{*sys.modules} - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("msp.")}
    assert "formats" in rooms and rooms <= {"formats", "base", "errors"}
