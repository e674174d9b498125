"""The interface of allocators, the evidence that they can ask for, and their registry.

A new allocator takes a few lines::

    @register_allocator
    @dataclass(frozen=True)
    class FirstHalf:
        name: ClassVar[str] = "first-half"

        def allocate(self, problem: Problem) -> Allocated:
            half = problem.blocks / 2
            return problem.from_densities([1.5 if unit.block < half else 0.5 for unit in problem.units])
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from msp.base.identity import Identity
from msp.base.progress import NoProgress, Progress
from msp.base.registry import Registry
from msp.engine.evolution import EvolutionOptions, Fitness, asked
from msp.engine.state import Step
from msp.plan.budget import Budget, Unit
from msp.plan.levels import Levels, cost, kept_weights, levels_from_densities, uniform_density

if TYPE_CHECKING:
    from msp.engine.distributed import Workers


class Evidence(Protocol):
    """Measurements of a model. Each one is computed at the first request, and kept."""

    @property
    def identity(self) -> Identity:
        """The weights, tokens, pruner and other inputs of the measurements; a search resumes only if they agree."""
        ...

    def fisher_traces(self) -> Mapping[str, float]:
        """The Fisher trace of every linear."""
        ...

    def outlier_ratios(self, threshold: float) -> Sequence[float]:
        """The share, per block, of the Wanda scores above ``threshold`` times the block's mean score."""
        ...

    def predicted_losses(self) -> Mapping[str, Sequence[float]]:
        """The second-order loss 1/2 sum F w^2 of the pruned weights, per linear, at each level of its unit."""
        ...

    def fitness(self, shares: Sequence[float]) -> AbstractContextManager[Fitness]:
        """A context that yields the fitness of level vectors, raced over ``shares`` of the fitness tokens."""
        ...

    def release(self) -> None:
        """Free the measurements that are as large as the model; the next request computes them again."""
        ...


@dataclass(frozen=True)
class SearchSettings:
    """The limits and the setting of a search.

    Attributes:
        evaluations: the number of candidates to breed; None for the allocator's own number.
        tokens: no generation begins after this many forwarded tokens; None sets no limit.
        checkpoint: the file that is written after every generation.
        resume: continue from ``checkpoint``.
        workers: the processes that run candidates; None for this process.
        constants: fields of ``EvolutionOptions`` that replace the allocator's own.
    """

    evaluations: int | None = None
    tokens: int | None = None
    checkpoint: Path | None = None
    resume: bool = False
    workers: Workers | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """The units in order of depth, their budget, and the evidence about the model.

    ``hints`` are levels that were found for a budget near this one. A search may add them to its own first levels.
    """

    units: tuple[Unit, ...]
    budget: Budget
    evidence: Evidence
    seed: int = 0
    search: SearchSettings = field(default_factory=SearchSettings)
    progress: Progress = field(default_factory=NoProgress)
    hints: tuple[Levels, ...] = ()

    @property
    def identity(self) -> Identity:
        """The identity of a search for this problem, as far as it is known before any work."""
        return {**asked(self.units, self.budget, self.seed), **self.evidence.identity}

    @property
    def blocks(self) -> int:
        return 1 + max(unit.block for unit in self.units)

    @property
    def density(self) -> float:
        """The density that meets the budget when every unit has it."""
        return uniform_density(self.units, self.budget)

    def from_densities(self, relative: Sequence[float]) -> Allocated:
        """The levels nearest to ``relative`` densities that meet the budget; 1 is the problem's ``density``."""
        wished = np.asarray(relative, dtype=np.float64) * self.density
        return Allocated(levels_from_densities(wished.tolist(), self.units, self.budget))

    def densities(self, levels: Levels) -> list[float]:
        """The density of every unit: the size of its level."""
        return [unit.sizes[level] for unit, level in zip(self.units, levels, strict=True)]

    def kept(self, levels: Levels) -> int:
        """The number of weights that ``levels`` keep."""
        return kept_weights(levels, self.units)

    def cost(self, levels: Levels) -> int:
        """The cost of ``levels``, in the unit of the budget."""
        return cost(levels, self.units)


@dataclass
class Allocated:
    """The level of every unit, and the search's measured candidates, forwarded tokens, history and constants."""

    levels: Levels
    evaluations: int = 0
    tokens: int = 0
    history: list[Step] = field(default_factory=list)
    options: EvolutionOptions | None = None


class Allocator(Protocol):
    """Decides the level of every unit."""

    name: ClassVar[str]

    def allocate(self, problem: Problem) -> Allocated: ...


def allocate(allocator: Allocator, problem: Problem) -> Allocated:
    """The levels that ``allocator`` finds for ``problem``.

    The function warns if an allocator that does not search returns the levels of ``uniform``. Its densities then differ
    by less than one level, and a comparison of the two would compare a model with itself.
    """
    found = allocator.allocate(problem)
    choices = sum(unit.top > 0 for unit in problem.units)
    if allocator.name != "uniform" and not found.history and choices > 1:
        uniform = problem.from_densities([1.0] * len(problem.units))
        if np.array_equal(found.levels, uniform.levels):
            warnings.warn(
                f"allocator {allocator.name!r} gives every unit the level that uniform gives: rounded to the levels "
                "there are, its densities do not differ; a larger group size or more patterns have finer levels",
                stacklevel=3,
            )
    return found


ALLOCATORS: Registry[Allocator] = Registry("allocator", ("name", "allocate"))

register_allocator = ALLOCATORS.register
get_allocator = ALLOCATORS.get


def allocator_names() -> tuple[str, ...]:
    """The names of all registered allocators, sorted."""
    return ALLOCATORS.names
