"""Genetic operators on level vectors. Each returns a vector that still has to be repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from msp.allocators.levels import Levels
from msp.patterns import Unit

Mutation = Callable[[Levels, Sequence[Unit], int, np.random.Generator], Levels]


def crossover(first: Levels, second: Levels, rng: np.random.Generator) -> Levels:
    """Single-point crossover: ``first`` up to a random cut, ``second`` behind it (units go by depth)."""
    cut = int(rng.integers(1, len(first))) if len(first) > 1 else 0
    return np.concatenate([first[:cut], second[cut:]])


def swap(levels: Levels, units: Sequence[Unit], step: int, rng: np.random.Generator) -> Levels:
    """Some unit gives up to ``step`` levels, another takes as much of the budget; one to three times over.

    The count min(U{1..3}, U{1..3}) is EvoPress's (arXiv 2410.14649). Where the two units differ in size the
    taker gets the nearest number of levels, so that repair has little left to do.
    """
    mutant: Levels = levels.copy()
    for _ in range(int(min(rng.integers(1, 4), rng.integers(1, 4)))):
        givers = [i for i, unit in enumerate(units) if mutant[i] > 0]
        if not givers:
            break  # a crossover, not repaired yet, may have left nothing to give
        giver = int(rng.choice(givers))
        takers = [i for i, unit in enumerate(units) if i != giver and mutant[i] < unit.top]
        if not takers:
            break
        taker = int(rng.choice(takers))
        given = min(int(rng.integers(1, step + 1)), int(mutant[giver]))
        costs = units[giver].costs
        freed = costs[mutant[giver]] - costs[mutant[giver] - given]
        mutant[giver] -= given
        mutant[taker] = _nearest_rise(units[taker], int(mutant[taker]), freed)
    return mutant


def _nearest_rise(unit: Unit, level: int, freed: int) -> int:
    """The level above ``level`` whose further cost is nearest to ``freed``."""
    return min(range(level + 1, unit.top + 1), key=lambda new: abs(unit.costs[new] - unit.costs[level] - freed))


def shift_group(levels: Levels, units: Sequence[Unit], step: int, rng: np.random.Generator) -> Levels:
    """All units of one block, or of one kind in a run of blocks, move together; the others pay.

    Layers of one kind resemble each other, and a change to one of them alone is lost in the noise of
    a small token set: moving them together is the larger step that swaps would take many turns to.
    """
    mutant: Levels = levels.copy()
    direction = int(rng.choice([-1, 1])) * int(rng.integers(1, step + 1))
    blocks = sorted({unit.block for unit in units})
    if rng.random() < 0.4:
        block = int(rng.choice(blocks))
        members = [i for i, unit in enumerate(units) if unit.block == block]
    else:
        kind = str(rng.choice(sorted({unit.kind for unit in units})))
        first, last = sorted(int(b) for b in rng.choice(blocks, size=2))
        members = [i for i, unit in enumerate(units) if unit.kind == kind and first <= unit.block <= last]
    for index in members:
        mutant[index] = np.clip(mutant[index] + direction, 0, units[index].top)
    return mutant


MUTATIONS: dict[str, Mutation] = {"swap": swap, "shift_group": shift_group}
