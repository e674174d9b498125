"""Patterns, allocations and budgets: exact arithmetic and clear errors."""

import json
from fractions import Fraction
from itertools import product

import pytest
from families import nm_unit
from hypothesis import given
from hypothesis import strategies as st

from msp.errors import MspError, UsageError
from msp.formats.patterns import GROUP_SIZES, Allocation, NMPattern
from msp.plan.budget import Budget, Unit, parse_sparsity


def unit(name: str, weights: int, group_size: int = 8, block: int = 0, kind: str = "k") -> Unit:
    return nm_unit(name, weights, group_size, block, kind)


@given(st.sampled_from(GROUP_SIZES).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))))
def test_a_pattern_reads_what_it_writes(pair: tuple[int, int]) -> None:
    pattern = NMPattern(*pair)
    assert NMPattern.parse(str(pattern)) == pattern
    assert pattern.kept(3, 5 * pattern.m) == 15 * pattern.n
    assert pattern.density == Fraction(pattern.n, pattern.m)


@pytest.mark.parametrize("text", ["", "2", "2:", "2/8", "2:8:1", "-1:8", "2:-8", "two:8", "1.5:8"])
def test_what_is_no_pattern_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        NMPattern.parse(text)


@pytest.mark.parametrize("text", ["9:8", "5:4"])
def test_a_pattern_cannot_keep_more_than_its_group(text: str) -> None:
    with pytest.raises(UsageError, match="keeps more"):
        NMPattern.parse(text)


def test_group_sizes_outside_the_list_are_refused() -> None:
    with pytest.raises(UsageError, match="4, 8, 16, 32"):
        NMPattern(2, 6)


def test_kept_needs_whole_groups() -> None:
    with pytest.raises(MspError, match="12 columns"):
        NMPattern(2, 8).kept(1, 12)


@pytest.mark.parametrize(("pattern", "compliant"), [("2:4", True), ("1:8", True), ("2:16", True), ("3:8", False)])
def test_patterns_that_sparse_tensor_cores_always_take(pattern: str, compliant: bool) -> None:
    assert NMPattern.parse(pattern).always_compliant is compliant


def test_an_allocation_survives_a_file(tmp_path) -> None:
    allocation = Allocation({"a": NMPattern(2, 8), "b": NMPattern(0, 16)})
    allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == allocation
    assert allocation.kept({"a": (2, 16), "b": (4, 32)}) == 8


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": 3}', b'{"a": "9:8"}', b"\xff\xfe"])
def test_a_file_that_is_no_allocation_is_named(tmp_path, content: bytes) -> None:
    path = tmp_path / "allocation.json"
    path.write_bytes(content)
    with pytest.raises(MspError):
        Allocation.load(path)


def test_sparsity_is_read_as_the_decimal_it_shows() -> None:
    assert parse_sparsity(0.1) == Fraction(1, 10)
    assert parse_sparsity("0.875") == Fraction(7, 8)


@pytest.mark.parametrize(
    "value",
    [0, 1, -0.5, 1.5, float("nan"), float("inf"), "much", "", "1/0", "1e400", "1e-400", "1e999999999", "9" * 5000],
)
def test_sparsity_outside_zero_and_one_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="sparsity"):
        parse_sparsity(value)  # type: ignore[arg-type]


sizes = st.lists(st.integers(1, 12).map(lambda n: 4 * n), min_size=1, max_size=4)


@given(sizes, st.fractions(0, 1))
def test_the_target_is_the_nearest_sum_that_levels_can_reach(weights: list[int], share: Fraction) -> None:
    units = [unit(str(i), w, 4) for i, w in enumerate(weights)]
    limit = int(share * sum(weights))
    budget = Budget.for_units(units, limit)
    totals = {
        sum(u.costs[level] for level, u in zip(levels, units, strict=True))
        for levels in product(range(5), repeat=len(units))
    }
    best = max(total for total in totals if total <= limit)
    assert budget.is_met(best)
    smallest = min(u.costs[1] for u in units)
    # Met means within a smallest step of the limit, or the best there is.
    assert budget.target_floor == max(0, min(best, limit - smallest + 1))


def test_budgets_beyond_the_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="outside"):
        Budget.for_units([unit("a", 64)], 64 + 8)
    with pytest.raises(UsageError, match="outside"):
        Budget.for_units([unit("a", 64)], -1)


def test_allocations_are_plain_json() -> None:
    strings = Allocation({"x": NMPattern(3, 8)}).to_strings()
    assert json.loads(json.dumps(strings)) == {"x": "3:8"}
