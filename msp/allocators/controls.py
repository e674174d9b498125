"""Allocators that ``msp`` is compared with: other searches, and a choice among ramps.

All of them measure candidates on the same fitness tokens, and count the tokens that they forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from msp.allocators.base import Allocated, Problem, register_allocator
from msp.allocators.evolution import fisher_seeds, search
from msp.allocators.ramp import Ramp
from msp.allocators.uniform import Uniform
from msp.engine.evolution import EvolutionOptions
from msp.engine.operators import swap
from msp.plan.levels import repair

# One stage on all tokens, as the paper describes. Its constants are not public.
PAPER = EvolutionOptions(token_shares=(1.0,), survivors=(), crossover_rate=0.5, emptied=0, patience=0)

# 400 generations of 64 offspring of one parent. The stages have 2,048, 16,384 and 65,536 tokens, drawn again in every
# generation, and 8, 2 and 1 offspring pass them (arXiv 2410.14649, the setting for unstructured sparsity). Here the
# stages have the same shares of the given fitness tokens.
EVOPRESS = EvolutionOptions(
    generations=400,
    population=1,
    parents=1,
    offspring=64,
    token_shares=(1 / 32, 1 / 4, 1.0),
    survivors=(1 / 8, 1 / 4),
    emptied=0,
    patience=0,
    resample=True,
)


@register_allocator
@dataclass(frozen=True)
class MspPaper:
    """MSP as published (arXiv 2503.11164), with one stage of fitness.

    The search starts from the Fisher seeds. Half of the offspring are crossovers; all are mutated and repaired.
    """

    name: ClassVar[str] = "msp-paper"

    def allocate(self, problem: Problem) -> Allocated:
        return search(problem, fisher_seeds(problem), PAPER)


@register_allocator
@dataclass(frozen=True)
class MspRandom:
    """The search of ``msp``, with measured sensitivities, from a random population and without Fisher traces."""

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

    A level of EvoPress is the same number of weights in every linear. A level of N:M is not, so a swap between linears
    of different size is repaired here. The tokens of a later stage include those of the earlier one, which are not
    forwarded again.
    """

    name: ClassVar[str] = "evopress"

    def allocate(self, problem: Problem) -> Allocated:
        return search(problem, [Uniform().allocate(problem).levels], EVOPRESS)


@register_allocator
@dataclass(frozen=True)
class RampBest:
    """The best of several ramps on the fitness tokens. ATP also chooses its slope so, but on test tokens."""

    name: ClassVar[str] = "ramp-best"
    slopes: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.75)

    def allocate(self, problem: Problem) -> Allocated:
        ramps = [Ramp(slope).allocate(problem).levels for slope in self.slopes]
        return search(problem, ramps, replace(PAPER, generations=0))
