"""Density that falls with depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from msp.allocators.base import Allocated, Problem, register_allocator


@register_allocator
@dataclass(frozen=True)
class Ramp:
    """An arithmetic progression over the blocks, sparser with depth (ATP, ICML 2025).

    ``slope`` is relative: density runs from ``1 + slope`` to ``1 - slope`` times the mean.
    """

    name: ClassVar[str] = "ramp"
    slope: float = 0.3

    def allocate(self, problem: Problem) -> Allocated:
        last = max(problem.blocks - 1, 1)
        return problem.from_densities([1 + self.slope * (1 - 2 * unit.block / last) for unit in problem.units])
