"""Integer levels per unit that meet a budget: the rounding of wanted densities, and the repair of levels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msp.errors import MspError
from msp.plan.budget import Budget, Unit, base_and_step

Levels = NDArray[np.int64]

# The most moves of which all pairs are tried.
MAX_CLOSING_MOVES = 1024


def cost(levels: Levels, units: Sequence[Unit]) -> int:
    """The cost of ``levels``, in the unit of the budget."""
    return sum(unit.costs[level] for level, unit in zip(levels, units, strict=True))


def kept_weights(levels: Levels, units: Sequence[Unit]) -> int:
    """The number of weights that ``levels`` keep: the size of each times the weights of its unit."""
    return sum(int(unit.weights * unit.levels[level].size) for level, unit in zip(levels, units, strict=True))


def levels_from_densities(densities: Sequence[float], units: Sequence[Unit], budget: Budget) -> Levels:
    """The levels nearest to real-valued ``densities`` that meet ``budget`` exactly.

    All densities are shifted by one amount, within the range of each unit, until their cost is the budget. They are
    then rounded down, and units rise by a level in the order of their lost fractions, the largest first.
    """
    wished = np.asarray(densities, dtype=np.float64)
    low, high = -1.0 - wished.max(), 1.0 - wished.min()
    for _ in range(100):
        middle = (low + high) / 2
        if _cost_of(wished + middle, units) > budget.limit:
            high = middle
        else:
            low = middle
    exact = np.array(
        [np.interp(size, unit.sizes, range(len(unit.sizes))) for size, unit in zip(wished + low, units, strict=True)]
    )
    levels = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - levels), kind="stable")
    return repair(levels, units, budget, order=order)


def uniform_density(units: Sequence[Unit], budget: Budget) -> float:
    """The density whose cost is the budget if every unit has it, within the range of the unit."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        spent = _cost_of([middle] * len(units), units)
        low, high = (low, middle) if spent > budget.limit else (middle, high)
    return low


def _cost_of(densities: Sequence[float] | NDArray[np.float64], units: Sequence[Unit]) -> float:
    """The cost of real-valued densities, interpolated between the sizes of the levels around them."""
    pairs = zip(densities, units, strict=True)
    return float(sum(np.interp(density, unit.sizes, unit.costs) for density, unit in pairs))


def repair(
    levels: Levels,
    units: Sequence[Unit],
    budget: Budget,
    *,
    rng: np.random.Generator | None = None,
    order: Sequence[int] | NDArray[np.int64] | None = None,
) -> Levels:
    """Change ``levels`` as little as possible to meet ``budget``: the cost is not above it, and near it from below.

    Units fall or rise by single levels in ``order``, or in an order drawn from ``rng``. Each unit moves once per round,
    so that no unit pays for all. If units of different size leave a gap that no single level fits, the levels of
    several units change together.

    Raises:
        MspError: no levels meet the budget.
    """
    fixed = np.clip(levels, 0, [unit.top for unit in units])
    turns = np.asarray(order if order is not None else np.arange(len(units)))
    if rng is not None:
        turns = rng.permutation(len(units))
    spent = cost(fixed, units)
    while spent > budget.limit:
        for index in turns[::-1]:
            level, costs = fixed[index], units[index].costs
            if spent > budget.limit and level > 0:
                fixed[index] -= 1
                spent -= costs[level] - costs[level - 1]
    changed = True
    while changed:
        changed = False
        for index in turns:
            level, costs = fixed[index], units[index].costs
            if level < units[index].top and spent + costs[level + 1] - costs[level] <= budget.limit:
                fixed[index] += 1
                spent += costs[level + 1] - costs[level]
                changed = True
    if budget.is_met(spent):
        return fixed
    for radius in (1, 2):
        closed = _close_with_two(fixed, units, budget, turns, radius)
        if closed is not None:
            return closed
    return _close_exactly(fixed, units, budget, turns)


def _close_with_two(
    levels: Levels, units: Sequence[Unit], budget: Budget, turns: NDArray[np.int64], radius: int
) -> Levels | None:
    """Levels that meet the budget and differ in at most two units by at most ``radius``; None if there are none."""
    near = [
        (index, level)
        for index in turns
        for level in range(max(0, levels[index] - radius), min(units[index].top, levels[index] + radius) + 1)
    ][:MAX_CLOSING_MOVES]
    owner, new = np.array(near).T
    moved = np.abs(new - levels[owner])
    change = np.array([units[i].costs[level] - units[i].costs[levels[i]] for i, level in near], dtype=np.int64)
    spent = cost(levels, units)
    sums = change[:, None] + change[None, :]
    meets = (sums >= budget.target_floor - spent) & (sums <= budget.limit - spent)
    meets &= owner[:, None] != owner[None, :]
    if not meets.any():
        return None
    price = np.where(meets, moved[:, None] + moved[None, :], len(near))
    chosen = list(np.unravel_index(int(price.argmin()), price.shape))
    fixed: Levels = levels.copy()
    fixed[owner[chosen]] = new[chosen]
    return fixed


def _close_exactly(levels: Levels, units: Sequence[Unit], budget: Budget, turns: NDArray[np.int64]) -> Levels:
    """Levels that meet the budget, by a dynamic programme over the costs that the first units can reach together.

    A unit keeps its level if the other units can then reach the budget; otherwise it takes the nearest such level.
    """
    base, step = base_and_step(units)
    room = (budget.limit - base) // step
    rises = [[(price - unit.costs[0]) // step for price in unit.costs] for unit in units]
    reached, mask = [1], (1 << (room + 1)) - 1
    for index in turns:
        following = 0
        for rise in rises[index]:
            following |= (reached[-1] << rise) & mask
        reached.append(following)
    left = reached[-1].bit_length() - 1
    if base + left * step < budget.target_floor:
        raise MspError(f"no levels cost between {budget.target_floor} and {budget.limit}")
    fixed: Levels = levels.copy()
    for before, index in zip(reached[-2::-1], turns[::-1], strict=True):
        fitting = [level for level, rise in enumerate(rises[index]) if rise <= left and before >> (left - rise) & 1]
        fixed[index] = min(fitting, key=lambda level: abs(level - int(levels[index])))
        left -= rises[index][fixed[index]]
    return fixed
