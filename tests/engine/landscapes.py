"""A search whose minimum is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from families import nm_unit

from msp.engine.fitness import Key
from msp.plan.budget import Budget
from msp.plan.levels import Levels

UNITS = [nm_unit(f"u{i}", 8 * (3 if i % 3 else 5), 8, i // 3, f"k{i % 3}") for i in range(18)]
BUDGET = Budget.for_units(UNITS, sum(unit.weights for unit in UNITS) // 4)


class Quadratic:
    """Distance to a hidden optimum; earlier stages see it through noise that is fixed per candidate."""

    def __init__(self, stages: int = 2) -> None:
        self.stages = stages
        self.tokens = 0
        self.calls: list[tuple[int, Key]] = []
        self.draws: list[int] = []
        self._optimum = np.array([4, 1, 2, 3, 1, 3, 2, 2, 2] * 2)

    def __call__(self, candidates: Sequence[Key], stage: int, draw: int = 0) -> list[float]:
        return [self.loss(key, stage, draw) for key in candidates]

    def loss(self, key: Key, stage: int, draw: int) -> float:
        self.calls.append((stage, key))
        self.draws.append(draw)
        self.tokens += 1
        noise = 0.0 if stage == self.stages - 1 else (hash(key) % 7) / 10
        return float(np.square(np.array(key) - self._optimum).sum()) + noise


def start() -> list[Levels]:
    return [np.full(len(UNITS), 2)]
