"""Measured sensitivities: the change of the loss when one unit moves up or down, and candidates made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from msp.engine.fitness import Key, key_of
from msp.plan.budget import Budget, Unit
from msp.plan.levels import Levels, repair

# Ratio of the sizes of two successive sets of moves. One move too many can cost more than all the others gain.
GROWTH = 1.5

# Weight of an effect, relative to the effect measured one generation later. An older effect adds other tokens to the
# mean, but it was measured around another individual.
DECAY = 0.5

Move = tuple[int, int]
"""The index of a unit, and the direction of its move: -1 or 1."""
Effects = Mapping[Move, float]
"""The effect of each move: the loss with the move minus the loss without it."""
Measured = Sequence[tuple[Key, Effects]]
"""All measurements, the oldest first: the individual that was moved, and the effects of the moves."""


def single_moves(base: Key, units: Sequence[Unit], step: int) -> dict[Move, Key]:
    """Copies of ``base``, by move, in which one unit is ``step`` levels lower or higher; they miss the budget."""
    moves = {}
    for index, (level, unit) in enumerate(zip(base, units, strict=True)):
        for direction in (-1, 1):
            new = min(max(level + direction * step, 0), unit.top)
            if new != level:
                moves[index, direction] = (*base[:index], new, *base[index + 1 :])
    return moves


def averaged(measured: Measured, base: Key) -> dict[Move, float]:
    """The mean effect of each move around ``base``; later measurements weigh more.

    A measurement around another individual counts only for the units whose level there is their level in ``base``.
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
    """``count`` of ``moves``: first those never measured from their level in ``base``, then the longest unmeasured."""
    if len(moves) <= count:
        return dict(moves)
    last = dict.fromkeys(moves, -1)
    for time, (around, effects) in enumerate(measured):
        last.update((move, time) for move in effects if move in last and around[move[0]] == base[move[0]])
    chosen = sorted(moves, key=lambda move: (last[move], rng.random()))[:count]
    return {move: moves[move] for move in sorted(chosen)}


class Sensitivities:
    """The best sets of moves around ``base``, by the measured effects of single moves.

    To first order, the effects of single moves add up. The effects therefore give the best set of each size: the
    units that gain most per added weight rise, and the units that lose least per removed weight pay for them. The
    effects do not give the largest size at which the sum still holds, so the class offers sets of growing sizes. It
    also offers sets from random halves of the units, because moves that spoil each other may then be apart.

    Args:
        units, budget: the units and the budget that every child meets.
        base: the levels around which the effects were measured; they meet the budget.
        effects: the effects of single moves around ``base``; infinite ones are left out.
        step: the number of levels of a move.
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
        """The cost that a rise adds, or that a fall frees."""
        index, _ = move
        costs = self._units[index].costs
        return abs(costs[self._moves[move][index]] - costs[self._base[index]])

    def children(self, count: int, rng: np.random.Generator) -> list[Key]:
        """Up to ``count`` level vectors, two thirds of them from all units; fewer if few moves lower the loss."""
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
        """The levels after the best set of about ``most`` moves of ``allowed`` units, and the number of moved units.

        The set includes the falls that pay for its rises.
        """
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
