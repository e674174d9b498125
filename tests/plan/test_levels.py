"""Rounding and repair meet the budget for every mix of unit sizes."""

import numpy as np
import pytest
from families import nm_unit
from hypothesis import given, settings
from hypothesis import strategies as st

from msp.plan.budget import Budget, Unit
from msp.plan.levels import kept_weights, levels_from_densities, repair


def make_units(steps: list[int], group_size: int) -> list[Unit]:
    return [nm_unit(f"u{i}", step * group_size, group_size, i, "k") for i, step in enumerate(steps)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Unit], Budget]:
    group_size = draw(st.sampled_from([4, 8, 16]))
    # Sizes that share no divisor, one far larger than the rest: the hard mixes.
    steps = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 24, 64, 97, 1000]), min_size=1, max_size=8))
    units = make_units(steps, group_size)
    total = sum(unit.weights for unit in units)
    return units, Budget.for_units(units, draw(st.integers(0, total)))


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_repair_meets_the_budget_from_anywhere(problem: tuple[list[Unit], Budget], seed: int) -> None:
    units, budget = problem
    rng = np.random.default_rng(seed)
    start = rng.integers(-3, 20, size=len(units))
    before = start.copy()
    levels = repair(start, units, budget, rng=rng)
    kept = kept_weights(levels, units)
    assert kept <= budget.limit
    assert budget.is_met(kept)
    assert all(0 <= level <= unit.top for level, unit in zip(levels, units, strict=True))
    assert (start == before).all()


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_rounded_densities_meet_the_budget(problem: tuple[list[Unit], Budget], seed: int) -> None:
    units, budget = problem
    wished = np.random.default_rng(seed).uniform(0, 1, size=len(units))
    levels = levels_from_densities(wished.tolist(), units, budget)
    assert budget.is_met(kept_weights(levels, units))


def test_levels_that_meet_the_budget_are_left_alone() -> None:
    units = make_units([3, 3, 3, 3], 8)
    levels = np.array([2, 3, 1, 2])
    budget = Budget.for_units(units, kept_weights(levels, units))
    assert (repair(levels, units, budget, rng=np.random.default_rng(0)) == levels).all()


def test_equal_densities_that_fit_are_met_exactly() -> None:
    units = make_units([5, 9, 2], 8)
    budget = Budget.for_units(units, sum(unit.weights for unit in units) // 4)
    assert levels_from_densities([0.25] * 3, units, budget).tolist() == [2, 2, 2]


def test_rounding_follows_the_order_of_the_densities() -> None:
    units = make_units([1] * 5, 8)
    budget = Budget.for_units(units, 10)
    levels = levels_from_densities([0.1, 0.2, 0.25, 0.3, 0.4], units, budget)
    assert levels.sum() == 10
    assert (np.diff(levels) >= 0).all()


@pytest.mark.parametrize("limit", [1, 3, 8, 100, 103, 104, 399])
def test_a_gap_that_single_levels_cannot_close_is_closed_by_moving_several(limit: int) -> None:
    units = make_units([100, 1], 4)
    budget = Budget.for_units(units, limit)
    kept = kept_weights(repair(np.array([0, 4]), units, budget), units)
    assert budget.target_floor <= kept <= limit
    assert kept == max(a * 100 + b for a in range(5) for b in range(5) if a * 100 + b <= limit)
