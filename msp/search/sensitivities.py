"""Measured sensitivities: what a level more or less of each single unit does to the loss, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from msp.levels import Levels, repair
from msp.patterns import Budget, Unit
from msp.search.fitness import Key, key_of

# From one number of moves to the next; a move too many can cost more than all the others gain.
GROWTH = 1.5

# What an effect counts for, measured a time before the last one: it is of other tokens, but around another individual.
DECAY = 0.5

Move = tuple[int, int]
"""A unit, and the direction of its move."""
Effects = Mapping[Move, float]
"""By move: the loss with it minus the loss without."""
Measured = Sequence[tuple[Key, Effects]]
"""What was measured, oldest first: around which individual, and the effects."""


def single_moves(base: Key, units: Sequence[Unit], step: int) -> dict[Move, Key]:
    """``base`` with one unit ``step`` levels lower or higher, by unit and direction; none of them meets the budget."""
    moves = {}
    for index, (level, unit) in enumerate(zip(base, units, strict=True)):
        for direction in (-1, 1):
            new = min(max(level + direction * step, 0), unit.top)
            if new != level:
                moves[index, direction] = (*base[:index], new, *base[index + 1 :])
    return moves


def averaged(measured: Measured, base: Key) -> dict[Move, float]:
    """Effects of the moves around ``base``: means over what was measured, the later counting for more.

    Of what was measured around another individual those units count that have the same level in ``base``.
    """
    sums: dict[Move, float] = {}
    weights: dict[Move, float] = {}
    for age, (around, effects) in enumerate(reversed(measured)):
        for move, effect in effects.items():
            if around[move[0]] == base[move[0]]:
                sums[move] = sums.get(move, 0.0) + DECAY**age * effect
                weights[move] = weights.get(move, 0.0) + DECAY**age
    return {move: total / weights[move] for move, total in sums.items()}


def least_known(
    moves: Mapping[Move, Key], measured: Measured, base: Key, count: int, rng: np.random.Generator
) -> dict[Move, Key]:
    """``count`` of ``moves``: those not measured around ``base``'s levels yet, then those measured longest ago."""
    if len(moves) <= count:
        return dict(moves)
    last = dict.fromkeys(moves, -1)
    for time, (around, effects) in enumerate(measured):
        last.update((move, time) for move in effects if move in last and around[move[0]] == base[move[0]])
    chosen = sorted(moves, key=lambda move: (last[move], rng.random()))[:count]
    return {move: moves[move] for move in sorted(chosen)}


class Sensitivities:
    """The best moves around ``base`` by their measured effects.

    To first order effects of single moves add up. So of each number of moves the best set is known: the units that gain
    most by a weight more rise, those that lose least by a weight less pay. How many moves the sum holds for is not, and
    so sets of growing numbers are offered, and sets drawn from random halves of the units, which leave out what did not
    add up in the others.

    Args:
        units, budget: what the sets keep to.
        base: meets the budget.
        effects: of every single move around ``base``.
        step: levels of a move.
    """

    def __init__(self, units: Sequence[Unit], budget: Budget, base: Key, effects: Effects, step: int) -> None:
        self._units = units
        self._budget = budget
        self._base = base
        self._moves = single_moves(base, units, step)
        rates = [(effect / self._price(move), *move) for move, effect in effects.items() if effect < np.inf]
        self._rises = sorted(rate for rate in rates if rate[2] > 0)
        self._falls = sorted(rate for rate in rates if rate[2] < 0)

    def _price(self, move: tuple[int, int]) -> int:
        """What a rise costs, or a fall frees."""
        index, _ = move
        costs = self._units[index].costs
        return abs(costs[self._moves[move][index]] - costs[self._base[index]])

    def children(self, count: int, rng: np.random.Generator) -> list[Key]:
        """Up to ``count`` level vectors, two thirds of them from all units; fewer where few moves promise anything."""
        everyone = np.ones(len(self._units), dtype=bool)
        _, most = self._climb(len(self._units), everyone)
        sizes = sorted({*(int(size) for size in 2 * GROWTH ** np.arange(40) if size < most), most} - {0, 1})
        found = dict.fromkeys(self._climb(size, everyone)[0] for size in sizes[-(count * 2 // 3) :])
        for _ in range(4 * count if sizes else 0):
            if len(found) == count:
                break
            found[self._climb(int(rng.choice(sizes)), rng.random(len(self._units)) < 0.5)[0]] = None
        return list(found)

    def _climb(self, most: int, allowed: NDArray[np.bool_]) -> tuple[Key, int]:
        """The best set of about ``most`` moves of ``allowed`` units, with what pays for its rises, and its size."""
        rises = [rate for rate in self._rises if allowed[rate[1]]]
        falls = [rate for rate in self._falls if allowed[rate[1]]]
        levels: Levels = np.array(self._base)
        moved: set[int] = set()
        balance = 0
        while falls and (balance > 0 or (len(moved) < most and rises and rises[0][0] + falls[0][0] < 0)):
            _, index, direction = falls[0] if balance > 0 else rises[0]
            balance += direction * self._price((index, direction))
            levels[index] = self._moves[index, direction][index]
            moved.add(index)
            rises, falls = ([rate for rate in rates if rate[1] != index] for rates in (rises, falls))
        return key_of(repair(levels, self._units, self._budget)), len(moved)
