"""One density for all units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from msp.allocators.base import Allocated, Problem, register_allocator


@register_allocator
@dataclass(frozen=True)
class Uniform:
    """Every unit keeps the same share of its weights, as in N:M pruning without an allocator."""

    name: ClassVar[str] = "uniform"

    def allocate(self, problem: Problem) -> Allocated:
        return problem.from_densities([1.0] * len(problem.units))
