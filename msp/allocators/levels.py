"""Integer levels (N per unit) that meet a budget: rounding of wished densities, and repair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msp.errors import MspError
from msp.patterns import Budget, Unit

Levels = NDArray[np.int64]


def kept_weights(levels: Levels, units: Sequence[Unit]) -> int:
    """Weights kept when unit ``i`` keeps ``levels[i]`` of every group."""
    return sum(int(level) * unit.step for level, unit in zip(levels, units, strict=True))


def levels_from_densities(densities: Sequence[float], units: Sequence[Unit], budget: Budget) -> Levels:
    """The levels nearest to real-valued ``densities`` that meet ``budget`` exactly.

    Densities are shifted by a common amount, with clipping to [0, 1], until they weigh what the
    budget allows; the fractions that rounding leaves are then filled largest first.
    """
    wished = np.asarray(densities, dtype=np.float64)
    group = np.array([unit.group_size for unit in units], dtype=np.float64)
    weights = np.array([unit.weights for unit in units], dtype=np.float64)
    low, high = -1.0 - wished.max(), 1.0 - wished.min()
    for _ in range(100):
        middle = (low + high) / 2
        if float(weights @ np.clip(wished + middle, 0, 1)) > budget.limit:
            high = middle
        else:
            low = middle
    exact = np.clip(wished + low, 0, 1) * group
    levels = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - levels), kind="stable")
    return repair(levels, units, budget, order=order)


def repair(
    levels: Levels,
    units: Sequence[Unit],
    budget: Budget,
    *,
    rng: np.random.Generator | None = None,
    order: Sequence[int] | NDArray[np.int64] | None = None,
) -> Levels:
    """Change ``levels`` as little as needed to meet ``budget`` (kept <= limit, within a smallest step).

    Single levels are taken or given in ``order`` (or in an order drawn from ``rng``), each unit once
    per round, so that no unit pays for all. Where units of different size leave a gap that no single
    level fits, a dynamic programme over the reachable sums closes it.
    """
    fixed = np.clip(levels, 0, [unit.group_size for unit in units])
    turns = np.asarray(order if order is not None else np.arange(len(units)))
    if rng is not None:
        turns = rng.permutation(len(units))
    kept = kept_weights(fixed, units)
    while kept > budget.limit:
        for index in turns[::-1]:
            if kept > budget.limit and fixed[index] > 0:
                fixed[index] -= 1
                kept -= units[index].step
    changed = True
    while changed:
        changed = False
        for index in turns:
            if fixed[index] < units[index].group_size and kept + units[index].step <= budget.limit:
                fixed[index] += 1
                kept += units[index].step
                changed = True
    return fixed if budget.is_met(kept) else _close_gap(fixed, units, budget, turns)


def _close_gap(levels: Levels, units: Sequence[Unit], budget: Budget, turns: NDArray[np.int64]) -> Levels:
    """Fewest level changes that bring the total into [target_floor, limit]: breadth-first over totals."""
    start = kept_weights(levels, units)
    steps: dict[int, list[int]] = {}
    for index in turns:
        steps.setdefault(units[index].step, []).append(int(index))
    room = {
        step: (sum(int(levels[i]) for i in members), sum(units[i].group_size - int(levels[i]) for i in members))
        for step, members in steps.items()
    }
    # A state is the net number of levels moved in each size class; totals identify it well enough.
    origin = tuple(0 for _ in room)
    frontier, seen, sizes = [origin], {start}, list(room)
    while frontier:
        following = []
        for state in frontier:
            total = start + sum(moved * size for moved, size in zip(state, sizes, strict=True))
            if budget.is_met(total):
                return _apply_moves(levels, units, {s: m for s, m in zip(sizes, state, strict=True)}, steps)
            for position, size in enumerate(sizes):
                down, up = room[size]
                for direction in (1, -1):
                    moved = state[position] + direction
                    reached = total + direction * size
                    if -down <= moved <= up and reached not in seen:
                        seen.add(reached)
                        following.append((*state[:position], moved, *state[position + 1 :]))
        frontier = following
    raise MspError(f"no levels keep between {budget.target_floor} and {budget.limit} weights")


def _apply_moves(levels: Levels, units: Sequence[Unit], moves: dict[int, int], steps: dict[int, list[int]]) -> Levels:
    fixed: Levels = levels.copy()
    for size, moved in moves.items():
        direction = 1 if moved > 0 else -1
        while moved:
            for index in steps[size]:
                if moved and 0 <= fixed[index] + direction <= units[index].group_size:
                    fixed[index] += direction
                    moved -= direction
    return fixed
