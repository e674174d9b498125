"""What an allocator is, what it may ask for, and where allocators are found by name.

An allocator of one's own takes a few lines::

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from msp.errors import UsageError
from msp.identity import Identity
from msp.levels import Levels, cost, kept_weights, levels_from_densities, uniform_density
from msp.patterns import Allocation, Budget, Unit
from msp.progress import NoProgress, Progress
from msp.search.evolution import EvolutionOptions, Fitness, asked
from msp.search.state import Step

if TYPE_CHECKING:
    from msp.search.distributed import Workers


class Evidence(Protocol):
    """What can be found out about a model. Each answer is computed when first asked for, then kept."""

    @property
    def identity(self) -> Identity:
        """The weights, tokens, pruner and all else behind the answers; a search resumes only on the same."""
        ...

    def fisher_traces(self) -> Mapping[str, float]:
        """Fisher trace of every linear."""
        ...

    def outlier_ratios(self, threshold: float) -> Sequence[float]:
        """Per block: share of the Wanda scores above ``threshold`` times the block's mean score."""
        ...

    def predicted_losses(self) -> Mapping[str, Sequence[float]]:
        """Per linear: second-order loss 1/2 sum F w^2 of what is pruned at each level of its unit."""
        ...

    def fitness(self, shares: Sequence[float]) -> AbstractContextManager[Fitness]:
        """Measures level vectors, in the order of the problem's units, on ``shares`` of the fitness tokens."""
        ...

    def release(self) -> None:
        """Let go of answers as large as the model; they are computed again if they are asked for again."""
        ...


@dataclass(frozen=True)
class SearchSettings:
    """How long an allocator may search: candidates it measures, tokens it forwards; None leaves its own constants.

    ``checkpoint`` is written once a generation. Without ``workers`` candidates are run in this process. ``constants``
    are fields of ``EvolutionOptions`` in the place of the allocator's own.
    """

    evaluations: int | None = None
    tokens: int | None = None
    checkpoint: Path | None = None
    resume: bool = False
    workers: Workers | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Units in order of depth, the budget they share, and what is known about the model.

    ``hints`` are levels that a search may start from besides its own, found for a budget near this one.
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
        """What a search for it depends on, as far as that is known before any work."""
        return {**asked(self.units, self.budget, self.seed), **self.evidence.identity}

    @property
    def blocks(self) -> int:
        return 1 + max(unit.block for unit in self.units)

    @property
    def density(self) -> float:
        """The density that meets the budget when every unit has it."""
        return uniform_density(self.units, self.budget)

    def from_densities(self, relative: Sequence[float]) -> Allocated:
        """Levels nearest to ``relative`` densities (1 is the budget's own), meeting the budget exactly."""
        wished = np.asarray(relative, dtype=np.float64) * self.density
        return Allocated(levels_from_densities(wished.tolist(), self.units, self.budget))

    def allocation(self, levels: Levels) -> Allocation:
        """The pattern of every linear of every unit."""
        return Allocation(
            {
                name: unit.patterns[level]
                for unit, level in zip(self.units, levels, strict=True)
                for name in unit.linears
            }
        )

    def densities(self, levels: Levels) -> list[float]:
        """The density of every unit."""
        return [float(unit.patterns[level].density) for unit, level in zip(self.units, levels, strict=True)]

    def kept(self, levels: Levels) -> int:
        """Weights kept."""
        return kept_weights(levels, self.units)

    def cost(self, levels: Levels) -> int:
        """What ``levels`` take of the budget."""
        return cost(levels, self.units)


@dataclass
class Allocated:
    """Levels per unit, and what finding them took: candidates measured, tokens forwarded, the search's constants."""

    levels: Levels
    evaluations: int = 0
    tokens: int = 0
    history: list[Step] = field(default_factory=list)
    options: EvolutionOptions | None = None


class Allocator(Protocol):
    """Decides how many of every M weights each unit keeps."""

    name: ClassVar[str]

    def allocate(self, problem: Problem) -> Allocated: ...


def allocate(allocator: Allocator, problem: Problem) -> Allocated:
    """The levels that ``allocator`` finds for ``problem``.

    Warns if an allocator that does not search ends at the levels of ``uniform``: its densities then differ by less
    than the levels can tell apart, and a comparison of the two would compare a model with itself.
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


Factory = TypeVar("Factory", bound=Callable[..., Any])

_REGISTRY: dict[str, Callable[..., Allocator]] = {}


def register_allocator(factory: Factory) -> Factory:
    """Class decorator: make an allocator available under its ``name``."""
    _REGISTRY[factory.name] = factory  # type: ignore[attr-defined]
    return factory


def allocator_names() -> tuple[str, ...]:
    return tuple(_REGISTRY)


def get_allocator(name: str, **options: Any) -> Allocator:
    """The allocator registered as ``name``; ``UsageError`` lists the known ones."""
    if name not in _REGISTRY:
        raise UsageError(f"unknown allocator {name!r}; known: {', '.join(allocator_names())}")
    try:
        return _REGISTRY[name](**options)
    except TypeError as error:
        raise UsageError(f"allocator {name!r}: {error}") from error
