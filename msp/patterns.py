"""N:M patterns, allocations and budgets: exact integer arithmetic, no tensors.

``N:M`` means N weights KEPT of every M consecutive ones along the input dimension.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from msp.errors import MspError, UsageError
from msp.reading import read_json, shown

GROUP_SIZES = (4, 8, 16, 32)

# Above this many distinct sums (a bit each) exact reachability costs more memory than it is worth,
# and so many units of a tiny common step reach the last step anyway.
MAX_REACHABLE_BITS = 1 << 28


def check_group_size(group_size: int) -> int:
    """Return ``group_size`` if it is one of 4, 8, 16, 32; raise ``UsageError`` otherwise."""
    if group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise UsageError(f"group size {group_size} is not supported: choose one of {known}")
    return group_size


@dataclass(frozen=True, order=True)
class NMPattern:
    """Keep ``n`` of every ``m`` consecutive weights of a row. ``0:M`` is empty, ``M:M`` dense."""

    n: int
    m: int

    def __post_init__(self) -> None:
        check_group_size(self.m)
        if not 0 <= self.n <= self.m:
            raise UsageError(f"pattern {self.n}:{self.m} keeps more than its group or less than none")

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """Read ``"2:8"``."""
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*:\s*([0-9]{1,6})\s*", text)
        if match is None:
            raise UsageError(f"{shown(text)} is not a pattern; write N:M with N the number kept, like 2:8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> Fraction:
        """Share of the weights kept, N/M."""
        return Fraction(self.n, self.m)

    @property
    def is_empty(self) -> bool:
        return self.n == 0

    @property
    def is_dense(self) -> bool:
        return self.n == self.m

    @property
    def always_compliant(self) -> bool:
        """Whether every selection keeps at most 2 of each aligned 4, so 2:4 tensor cores can run it."""
        return self.n <= 2

    def kept(self, rows: int, columns: int) -> int:
        """Weights kept in a ``[rows, columns]`` matrix; ``columns`` must be a multiple of M."""
        if columns % self.m:
            raise MspError(f"{columns} columns are not a multiple of the group size {self.m}")
        return rows * (columns // self.m) * self.n


class Allocation(Mapping[str, NMPattern]):
    """An immutable map from the name of a linear to its pattern."""

    def __init__(self, patterns: Mapping[str, NMPattern] | Iterable[tuple[str, NMPattern]]) -> None:
        self._patterns = dict(patterns)

    def __getitem__(self, name: str) -> NMPattern:
        return self._patterns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def __repr__(self) -> str:
        return f"Allocation({self.to_strings()!r})"

    def kept(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Weights kept over all linears, given their ``[out, in]`` shapes."""
        return sum(pattern.kept(*shapes[name]) for name, pattern in self.items())

    def to_strings(self) -> dict[str, str]:
        return {name: str(pattern) for name, pattern in self.items()}

    @classmethod
    def from_strings(cls, patterns: Mapping[str, str]) -> Allocation:
        return cls({name: NMPattern.parse(text) for name, text in patterns.items()})

    def save(self, path: str | Path) -> None:
        """Write ``path`` in one step; ``MspError`` where it cannot be written."""
        from msp.files import write_text

        write_text(path, self.to_json())

    def to_json(self) -> str:
        """The text that ``save`` writes."""
        return json.dumps(self.to_strings(), indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read what ``save`` wrote; ``MspError`` names the file when it is not an allocation."""
        patterns = read_json(path)
        if not isinstance(patterns, dict) or not all(isinstance(p, str) for p in patterns.values()):
            raise MspError(f'{path}: an allocation is a JSON object of "name": "N:M"')
        try:
            return cls.from_strings(patterns)
        except UsageError as error:  # a file with a wrong entry is not a wrong request
            raise MspError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Unit:
    """What gets one level: one linear, or all prunable linears of a block.

    Attributes:
        weights: how many the unit has.
        group_size: the largest M among its patterns.
        patterns: what level 0, 1, ... stands for, ascending in density; without any, 0:M ... M:M.
        costs: what each level takes of the budget, ascending; without any, the weights it keeps.
    """

    name: str
    linears: tuple[str, ...]
    weights: int
    group_size: int
    block: int
    kind: str
    patterns: tuple[NMPattern, ...] = ()
    costs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.patterns:
            every = tuple(NMPattern(n, self.group_size) for n in range(self.group_size + 1))
            object.__setattr__(self, "patterns", every)
        if not self.costs:
            object.__setattr__(self, "costs", tuple(self.kept(level) for level in range(len(self.patterns))))

    @property
    def top(self) -> int:
        """The highest level."""
        return len(self.patterns) - 1

    def kept(self, level: int) -> int:
        """Weights kept at ``level``."""
        pattern = self.patterns[level]
        return self.weights // pattern.m * pattern.n


_NUMBER = re.compile(r"[+-]?([0-9]{1,40}/[0-9]{1,40}|[0-9]{0,40}\.?[0-9]{0,40}([eE][+-]?[0-9]{1,3})?)")


def parse_sparsity(sparsity: float | str | Fraction) -> Fraction:
    """The exact fraction a decimal stands for: 0.1 is 1/10, not its nearest double."""
    try:
        # an exponent of many digits would be written out
        text = sparsity if isinstance(sparsity, Fraction) else str(sparsity)
        if isinstance(text, str) and not _NUMBER.fullmatch(text.strip()):
            raise ValueError(text)
        exact = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"sparsity {shown(sparsity)} is not a number") from error
    # as a double too, which recipes hold
    if not 0 < exact < 1 or not 0 < float(exact) < 1:
        found = f"{float(exact):g}" if abs(exact) < 1e300 else shown(sparsity)
        raise UsageError(f"sparsity {found} is outside (0, 1)")
    return exact


@dataclass(frozen=True)
class Budget:
    """What the levels of units may cost together: kept weights, unless the units count something else.

    ``limit`` may not be exceeded. ``target_floor`` is what repair fills up to: within one smallest step of
    the limit, or, where the sizes of the units cannot reach that, the largest sum they can.
    """

    limit: int
    target_floor: int
    total: int

    @classmethod
    def for_units(cls, units: Sequence[Unit], limit: int) -> Budget:
        """``limit`` over ``units``, in what their ``costs`` count.

        Raises:
            UsageError: the lowest levels cost more, or the highest ones are at least a smallest step short of it.
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
    """The cost of all lowest levels, and the greatest common divisor of all that can be added to it."""
    base = sum(unit.costs[0] for unit in units)
    return base, math.gcd(*(cost - unit.costs[0] for unit in units for cost in unit.costs)) or 1


def _largest_reachable(units: Sequence[Unit], limit: int) -> int:
    """The largest sum of costs not above ``limit``: a bit set of sums in units of the steps' common divisor.

    Where that set would be too large, ``limit`` itself.
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
    """All of ``reachable`` with 0 ... ``count`` steps more, in a logarithm of as many shifts."""
    chunk = 1
    while count:
        take = min(chunk, count)
        reachable |= (reachable << (step * take)) & mask
        count -= take
        chunk *= 2
    return reachable
