"""What a search is compared with: other searches, and no more than a choice among ramps.

All of them measure candidates on the same fitness tokens and count the tokens they forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from msp.allocators.base import Allocated, Problem, register_allocator
from msp.allocators.evolution import fisher_seeds, search
from msp.allocators.ramp import Ramp
from msp.allocators.uniform import Uniform
from msp.levels import repair
from msp.search.evolution import EvolutionOptions
from msp.search.operators import swap

# One stage on all tokens: what the paper describes. Its constants are not public.
PAPER = EvolutionOptions(token_shares=(1.0,), survivors=(), crossover_rate=0.5, emptied=0, sensitivities=0)

# 400 generations of 64 offspring of one parent; 8, then 2, then 1 of them go on, on 2,048, 16,384 and 65,536 tokens,
# drawn anew every generation (arXiv 2410.14649, the setting for unstructured sparsity). The token counts are kept in
# proportion to the fitness tokens given.
EVOPRESS = EvolutionOptions(
    generations=400,
    population=1,
    parents=1,
    offspring=64,
    token_shares=(1 / 32, 1 / 4, 1.0),
    survivors=(1 / 8, 1 / 4),
    emptied=0,
    sensitivities=0,
    resample=True,
)


@register_allocator
@dataclass(frozen=True)
class MspPaper:
    """MSP as published (arXiv 2503.11164), with one stage of fitness.

    It starts from the Fisher seeds. Half of the offspring are crossovers; all are mutated by swaps and repaired.
    """

    name: ClassVar[str] = "msp-paper"

    def allocate(self, problem: Problem) -> Allocated:
        return search(problem, fisher_seeds(problem), PAPER)


@register_allocator
@dataclass(frozen=True)
class MspRandom:
    """The same search as ``msp``, measured sensitivities included, from a random population: no Fisher traces."""

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
        return search(problem, seeds, EvolutionOptions())


@register_allocator
@dataclass(frozen=True)
class EvoPress:
    """EvoPress (arXiv 2410.14649): a (1 + lambda) search from uniform levels by swaps alone, in three stages.

    Its levels step by a fixed number of weights in every linear; those of N:M do not, so a swap between linears
    of different size is repaired like any other move here. Tokens of a later stage include those of the earlier
    one, which then are not forwarded again.
    """

    name: ClassVar[str] = "evopress"

    def allocate(self, problem: Problem) -> Allocated:
        return search(problem, [Uniform().allocate(problem).levels], EVOPRESS)


@register_allocator
@dataclass(frozen=True)
class RampBest:
    """The best of several ramps on the fitness tokens: ATP's own way to choose its slope, but not on test tokens."""

    name: ClassVar[str] = "ramp-best"
    slopes: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.75)

    def allocate(self, problem: Problem) -> Allocated:
        ramps = [Ramp(slope).allocate(problem).levels for slope in self.slopes]
        return search(problem, ramps, replace(PAPER, generations=0))
