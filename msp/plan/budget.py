"""Units and budgets: exact integer arithmetic, no tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

from msp.base.reading import shown
from msp.errors import UsageError

# The most sums, at one bit each, for which the exact set of reachable sums is computed. A larger set costs too much
# memory, and with so many small steps the units reach the limit within one step anyway.
MAX_REACHABLE_BITS = 1 << 28


@dataclass(frozen=True)
class Level:
    """One choice for a unit. The search and the allocators know nothing else of it.

    Attributes:
        cost: the cost, in the unit of the budget.
        size: the share of the unit that stays, in [0, 1].
        label: the name that the compression gives it; the compression reads it back.
    """

    cost: int
    size: Fraction
    label: str


@dataclass(frozen=True)
class Unit:
    """The part of a model that gets one level: one linear, or all prunable linears of a block.

    Attributes:
        name: the name of the linear or of the block.
        linears: the names of the linears in the unit.
        weights: the number of weights of the unit.
        block: the index of the block.
        kind: the kind of the linear, or ``"block"``.
        levels: the levels 0, 1, ..., in rising cost; a unit that no compression has seen yet has none.

    Raises:
        UsageError: the costs do not rise, the sizes fall, or a size is outside [0, 1].
    """

    name: str
    linears: tuple[str, ...]
    weights: int
    block: int
    kind: str
    levels: tuple[Level, ...] = ()

    def __post_init__(self) -> None:
        for low, high in pairwise(self.levels):
            if low.cost >= high.cost or low.size > high.size:
                raise UsageError(f"{self.name}: level {high.label} must cost more and keep no less than {low.label}")
        for level in self.levels:
            if not 0 <= level.size <= 1:
                raise UsageError(f"{self.name}: level {level.label} has size {level.size}, outside [0, 1]")

    @property
    def top(self) -> int:
        """The highest level."""
        return len(self.levels) - 1

    # A search reads these for every move, so they are kept.
    @cached_property
    def costs(self) -> tuple[int, ...]:
        """The cost of every level."""
        return tuple(level.cost for level in self.levels)

    @cached_property
    def sizes(self) -> tuple[float, ...]:
        """The size of every level."""
        return tuple(float(level.size) for level in self.levels)


_NUMBER = re.compile(r"[+-]?([0-9]{1,40}/[0-9]{1,40}|[0-9]{0,40}\.?[0-9]{0,40}([eE][+-]?[0-9]{1,3})?)")


def parse_sparsity(sparsity: float | str | Fraction) -> Fraction:
    """The exact fraction of a decimal number: 0.1 is 1/10, not the nearest double.

    Raises:
        UsageError: it is not a number, or not in (0, 1).
    """
    try:
        # Fraction would write out a number with a long exponent, so the text is checked first
        text = sparsity if isinstance(sparsity, Fraction) else str(sparsity)
        if isinstance(text, str) and not _NUMBER.fullmatch(text.strip()):
            raise ValueError(text)
        exact = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"sparsity {shown(sparsity)} is not a number") from error
    # the nearest double must be in (0, 1) too, because recipes hold it
    if not 0 < exact < 1 or not 0 < float(exact) < 1:
        found = f"{float(exact):g}" if abs(exact) < 1e300 else shown(sparsity)
        raise UsageError(f"sparsity {found} is outside (0, 1)")
    return exact


@dataclass(frozen=True)
class Budget:
    """The budget of all units together, in the unit of their costs; by default they count kept weights.

    Attributes:
        limit: the most that the levels may cost.
        target_floor: the least cost that counts as meeting the budget. It is within one smallest step of the limit or,
            if the sizes of the units cannot reach that, the largest cost that they can reach.
        total: the cost of the highest levels.
    """

    limit: int
    target_floor: int
    total: int

    @classmethod
    def for_units(cls, units: Sequence[Unit], limit: int) -> Budget:
        """The budget ``limit`` for ``units``, in the unit of their ``costs``.

        Raises:
            UsageError: the lowest levels cost more than the limit, or the highest levels cost less than it by at least
                one smallest step.
        """
        least, most = sum(unit.costs[0] for unit in units), sum(unit.costs[-1] for unit in units)
        rises = [high - low for unit in units for low, high in pairwise(unit.costs)]
        smallest = min(rises, default=1)
        if not least <= limit < most + smallest:
            raise UsageError(f"a budget of {limit:,} is outside {least:,} ... {most:,}, what the units can take")
        return cls(limit, max(least, min(limit - smallest + 1, _largest_reachable(units, limit))), most)

    def is_met(self, cost: int) -> bool:
        return self.target_floor <= cost <= self.limit


def base_and_step(units: Sequence[Unit]) -> tuple[int, int]:
    """The cost of all lowest levels, and the greatest common divisor of the rises above it."""
    base = sum(unit.costs[0] for unit in units)
    return base, math.gcd(*(cost - unit.costs[0] for unit in units for cost in unit.costs)) or 1


def _largest_reachable(units: Sequence[Unit], limit: int) -> int:
    """The largest sum of costs that is not above ``limit``, or ``limit`` itself if the computation is too large.

    The computation holds the sums as a bit set, in units of the common divisor of the steps.
    """
    base, divisor = base_and_step(units)
    counts = Counter(tuple(cost - unit.costs[0] for cost in unit.costs) for unit in units)
    width = (limit - base) // divisor
    if width > MAX_REACHABLE_BITS:
        return limit
    reachable, mask = 1, (1 << (width + 1)) - 1
    for rises, count in counts.items():
        steps = [rise // divisor for rise in rises]
        if steps == list(range(0, steps[-1] + 1, steps[1] if len(steps) > 1 else 1)):
            reachable = _add_even_steps(reachable, steps[1] if len(steps) > 1 else 0, count * (len(steps) - 1), mask)
            continue
        for _ in range(count):
            before, reachable = reachable, 0
            for step in steps:
                reachable |= (before << step) & mask
    return base + (reachable.bit_length() - 1) * divisor


def _add_even_steps(reachable: int, step: int, count: int, mask: int) -> int:
    """The sums of ``reachable`` plus 0 ... ``count`` steps, computed with about log2(``count``) shifts."""
    chunk = 1
    while count:
        take = min(chunk, count)
        reachable |= (reachable << (step * take)) & mask
        count -= take
        chunk *= 2
    return reachable
