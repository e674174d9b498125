"""What files that msp reads hold: a manifest, a decode table, a recipe, and a search at its second generation."""

from __future__ import annotations

import math
from typing import Any

from families import nm_unit

from msp.engine.state import State, Step
from msp.plan.budget import Budget

UNITS = [nm_unit(f"u{i}", 64 * (1 + i % 3), 8, i // 2, "k") for i in range(6)]
BUDGET = Budget.for_units(UNITS, sum(unit.weights for unit in UNITS) // 2)
STAGES = 2

MANIFEST: dict[str, Any] = {
    "quant_method": "msp",
    "format": 1,
    "allocation": {"layers.0.up": "2:8", "layers.0.down": "8:8", "layers.1.up": "0:8"},
    "shapes": {"layers.0.up": [32, 64], "layers.0.down": [64, 32], "layers.1.up": [32, 64]},
    "shared": {"layers.2.up": "layers.0.up"},
    "recipe": {"pruner": "wanda", "kl": 0.25, "calibration": {"tokens": 64}},
    "versions": {"msp": "1", "torch": "2"},
}
TABLE: dict[str, Any] = {
    "tokens": 1,
    "dtype": "float32",
    "machine": {"cpu": "x", "threads": 2},
    "linears": [
        {"shape": [32, 64], "microseconds": {"dense": 10.5, "2:8": 4.25}},
        {"shape": [64, 32], "microseconds": {"dense": 11, "2:8": 4.5}},
    ],
}
RECIPE = {
    "pruning_stage": {
        "pruning_modifiers": {"NMPruningModifier": {"patterns": {"re:layers.0.*": "4:8", "a.b": "2:8", "c": "dense"}}}
    },
    "made_by": {"search": {"generations": 3, "survivors": [0.5, 0.5]}},
}

ONE, TWO = {"seed": "1"}, {"seed": "2"}


def state() -> State:
    keys = [(4, 4, 4, 4, 4, 4), (5, 3, 4, 4, 4, 4), (4, 3, 4, 5, 4, 4)]
    costs = [sum(unit.costs[level] for unit, level in zip(UNITS, key, strict=True)) for key in keys]
    assert max(costs) <= BUDGET.limit
    measured = {(1, key): 0.5 + index for index, key in enumerate(keys[:2])} | {(0, keys[2]): math.inf}
    history = [Step(0, 3, 100, 0.75, 1.0), Step(1, 3, 200, 0.5, 1.0)]
    population = [(0.5, keys[0]), (1.5, keys[1])]
    return State(1, population, measured, 200, history, 8.0, [(keys[0], {(0, 1): 0.25, (2, -1): math.inf})])


def check_state(found: State) -> None:
    """What a search relies on: every individual is one of the problem's."""
    assert found.population and found.history
    for _, key in found.population:
        assert all(0 <= level <= unit.top for level, unit in zip(key, UNITS, strict=True))
        assert sum(unit.costs[level] for unit, level in zip(UNITS, key, strict=True)) <= BUDGET.limit
