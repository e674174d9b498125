"""N:M patterns and allocations: integers, no tensors.

``N:M`` means N weights KEPT of every M consecutive ones along the input dimension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from msp.base.reading import read_json, shown
from msp.errors import MspError, UsageError

GROUP_SIZES = (4, 8, 16, 32)


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
        """Read a text like ``"2:8"``; ``UsageError`` if it is not a pattern."""
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*:\s*([0-9]{1,6})\s*", text)
        if match is None:
            raise UsageError(f"{shown(text)} is not a pattern; write N:M with N the number kept, like 2:8")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, pattern: NMPattern | str) -> NMPattern:
        """``pattern`` itself, or what its text like ``"2:8"`` says; ``UsageError`` if it is neither."""
        if isinstance(pattern, NMPattern):
            return pattern
        if isinstance(pattern, str):
            return cls.parse(pattern)
        raise UsageError(f"{shown(pattern)} is not a pattern; write N:M with N the number kept, like 2:8")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> Fraction:
        """The share of kept weights, N/M."""
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
        """The number of kept weights in a ``[rows, columns]`` matrix; ``columns`` must be a multiple of M."""
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
        """The number of kept weights of all linears, from their ``[out, in]`` shapes."""
        return sum(pattern.kept(*shapes[name]) for name, pattern in self.items())

    def to_strings(self) -> dict[str, str]:
        return {name: str(pattern) for name, pattern in self.items()}

    @classmethod
    def from_strings(cls, patterns: Mapping[str, str]) -> Allocation:
        return cls({name: NMPattern.parse(text) for name, text in patterns.items()})

    def save(self, path: str | Path) -> None:
        """Write ``path`` in one step; ``MspError`` if the write fails."""
        from msp.base.files import write_text

        write_text(path, self.to_json())

    def to_json(self) -> str:
        """The text that ``save`` writes."""
        return json.dumps(self.to_strings(), indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read a file that ``save`` wrote; ``MspError`` names the file if it is not an allocation."""
        patterns = read_json(path)
        if not isinstance(patterns, dict) or not all(isinstance(p, str) for p in patterns.values()):
            raise MspError(f'{path}: an allocation is a JSON object of "name": "N:M"')
        try:
            return cls.from_strings(patterns)
        except UsageError as error:  # a file with a wrong entry is not a wrong request
            raise MspError(f"{path}: {error}") from error
