"""Measured sensitivities: which sets of moves they offer."""

import itertools

import numpy as np
import pytest
from families import nm_unit

from msp.engine.sensitivities import DECAY, Sensitivities, averaged, least_known, single_moves
from msp.plan.budget import Budget
from msp.plan.levels import cost

UNITS = [nm_unit(f"u{i}", 8, 8, i, "k") for i in range(8)]
BASE = (2,) * 8
BUDGET = Budget.for_units(UNITS, cost(np.array(BASE), UNITS))


def sensitivities(effects: dict[tuple[int, int], float]) -> Sensitivities:
    return Sensitivities(UNITS, BUDGET, BASE, effects, 1)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_unit_moves_both_ways_within_its_levels(step: int) -> None:
    moves = single_moves((0, 1, 2, 7, 8, 2, 2, 2), UNITS, step)
    assert (0, -1) not in moves and (4, 1) not in moves and len(moves) == 14
    assert moves[1, -1][1] == max(0, 1 - step) and moves[3, 1][3] == min(8, 7 + step)


@pytest.mark.parametrize("seed", range(5))
def test_among_the_children_is_the_best_set_of_moves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slopes, curves = rng.normal(-0.3, 0.3, 8), rng.uniform(0, 0.2, 8)
    effects = {(unit, sign): slopes[unit] * sign + curves[unit] for unit, sign in single_moves(BASE, UNITS, 1)}

    def predicted(levels: tuple[int, ...]) -> float:
        return sum(effects[unit, level - 2] for unit, level in enumerate(levels) if level != 2)

    possible = [levels for levels in itertools.product((1, 2, 3), repeat=8) if sum(levels) == 16]
    best = min(map(predicted, possible))
    children = sensitivities(effects).children(16, rng)
    assert best < 0 and min(map(predicted, children)) == pytest.approx(best)
    assert len(set(children)) == len(children) <= 16
    assert all(sum(child) == 16 for child in children)


def test_moves_that_promise_nothing_give_no_children() -> None:
    worse = {move: 1.0 for move in single_moves(BASE, UNITS, 1)}
    assert sensitivities(worse).children(16, np.random.default_rng()) == []


def test_a_move_that_broke_the_model_is_left_alone() -> None:
    effects = {(unit, sign): 0.1 * sign * -unit for unit in range(8) for sign in (-1, 1)}
    effects |= {(7, 1): float("inf"), (0, -1): float("nan")}
    for child in sensitivities(effects).children(16, np.random.default_rng()):
        assert child[7] <= 2 <= child[0]


def test_units_of_different_size_pay_for_each_other() -> None:
    units = [nm_unit("large", 32, 8, 0, "k"), *(nm_unit(f"u{i}", 8, 8, i, "k") for i in range(1, 8))]
    budget = Budget.for_units(units, cost(np.array(BASE), units))
    effects = {move: (-0.9 if move == (0, 1) else 0.1) for move in single_moves(BASE, units, 1)}
    found = Sensitivities(units, budget, BASE, effects, 1).children(16, np.random.default_rng(0))
    assert any(child[0] == 3 and sum(child[1:]) == 10 for child in found)
    assert all(budget.is_met(cost(np.array(child), units)) for child in found)


def test_later_measurements_count_for_more_and_those_around_another_level_for_nothing() -> None:
    other = (3, *BASE[1:])
    measured = [(other, {(0, 1): 9.0, (1, 1): 2.0}), (BASE, {(0, 1): 1.0, (1, 1): 1.0, (2, -1): 0.5})]
    mean = averaged(measured, BASE)
    assert mean == pytest.approx({(0, 1): 1.0, (1, 1): (1 + DECAY * 2) / (1 + DECAY), (2, -1): 0.5})
    assert averaged(measured, other)[0, 1] == 9.0


def test_an_effect_that_is_not_finite_stays_so() -> None:
    measured = [(BASE, {(0, 1): float("inf")}), (BASE, {(0, 1): 0.1})]
    assert averaged(measured, BASE)[0, 1] == float("inf")


def test_moves_take_turns_where_there_are_too_many() -> None:
    rng, moves = np.random.default_rng(0), single_moves(BASE, UNITS, 1)
    assert least_known(moves, [], BASE, len(moves), rng) == moves
    measured: list[tuple[tuple[int, ...], dict[tuple[int, int], float]]] = []
    for _ in range(4):
        measured.append((BASE, dict.fromkeys(least_known(moves, measured, BASE, 4, rng), 0.0)))
    assert {move for _, effects in measured for move in effects} == moves.keys()
    assert least_known(moves, measured, BASE, 4, rng).keys() == measured[0][1].keys(), "the oldest ones"
    other = (3, *BASE[1:])
    assert {(0, -1), (0, 1)} <= least_known(single_moves(other, UNITS, 1), measured, other, 4, rng).keys()
