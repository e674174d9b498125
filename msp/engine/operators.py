"""Genetic operators on level vectors. Each returns a vector that still has to be repaired."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msp.plan.budget import Unit
from msp.plan.levels import Levels


def crossover(first: Levels, second: Levels, rng: np.random.Generator) -> Levels:
    """Single-point crossover: ``first`` up to a random cut, ``second`` after it; units are in order of depth."""
    cut = int(rng.integers(1, len(first))) if len(first) > 1 else 0
    return np.concatenate([first[:cut], second[cut:]])


def swap(levels: Levels, units: Sequence[Unit], step: int, rng: np.random.Generator) -> Levels:
    """Move levels from a random unit to another, one to three times; each move takes 1 to ``step`` levels.

    The number of moves, min(U{1..3}, U{1..3}), is EvoPress's (arXiv 2410.14649). The second unit rises to the level
    whose cost is nearest to the freed cost, so that the repair changes little.
    """
    mutant: Levels = levels.copy()
    for _ in range(int(min(rng.integers(1, 4), rng.integers(1, 4)))):
        givers = [i for i, unit in enumerate(units) if mutant[i] > 0]
        if not givers:
            break  # all units may be at level 0 after a crossover that is not repaired yet
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
    """The level above ``level`` whose additional cost is nearest to ``freed``."""
    return min(range(level + 1, unit.top + 1), key=lambda new: abs(unit.costs[new] - unit.costs[level] - freed))
