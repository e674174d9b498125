"""MSP: an evolutionary search over the levels, seeded from the Fisher traces (arXiv 2503.11164)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from msp.allocators.base import Allocated, Allocator, Problem, register_allocator
from msp.allocators.fisher_rank import FisherRank, FisherRankLinear
from msp.allocators.levels import Levels, repair
from msp.allocators.ramp import Ramp
from msp.allocators.uniform import Uniform
from msp.search.evolution import Evolution, Step
from msp.search.operators import swap


def search(problem: Problem, seeds: list[Levels]) -> Allocated:
    """Run the evolution from ``seeds`` and report its generations to ``problem.progress``."""
    settings = problem.search
    with problem.evidence.fitness() as fitness, problem.progress.stage("Search", settings.options.generations) as tell:

        def on_step(step: Step) -> None:
            tell(step.generation, best=step.best, candidates=step.evaluations)

        evolution = Evolution(
            problem.units,
            problem.budget,
            seeds,
            fitness,
            options=settings.options,
            seed=problem.seed,
            checkpoint=settings.checkpoint,
            resume=settings.resume,
            identity=problem.evidence.identity,
            on_step=on_step,
        )
        levels, history = evolution.run()
    last = history[-1]
    return Allocated(levels, last.evaluations, last.tokens, history)


@register_allocator
@dataclass(frozen=True)
class Msp:
    """The search as published, from Fisher-seeded individuals.

    The map from traces to first levels is not public. Here the first population holds block ranks at
    several spreads, the linear ranks at a small one, the depth ramp and the uniform allocation, which
    also makes the result no worse than those on the fitness tokens.
    """

    name: ClassVar[str] = "msp"
    spreads: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)

    def allocate(self, problem: Problem) -> Allocated:
        makers: list[Allocator] = [FisherRank(spread) for spread in self.spreads]
        makers += [FisherRankLinear(0.2), Ramp(), Uniform()]
        return search(problem, [maker.allocate(problem).levels for maker in makers])


@register_allocator
@dataclass(frozen=True)
class MspRandom:
    """The control: the same search from a random population, with no sensitivities at all."""

    name: ClassVar[str] = "msp-random"
    population: int = 9

    def allocate(self, problem: Problem) -> Allocated:
        rng = np.random.default_rng([problem.seed, 0])
        uniform = Uniform().allocate(problem).levels
        seeds = []
        for _ in range(self.population):
            individual = uniform
            for _ in range(len(problem.units) // 4 + 1):
                individual = swap(individual, problem.units, 1, rng)
            seeds.append(repair(individual, problem.units, problem.budget, rng=rng))
        return search(problem, seeds)
