"""MSP: an evolutionary search over the levels, seeded from the Fisher traces (arXiv 2503.11164)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from msp.allocators.base import Allocated, Allocator, Problem, register_allocator
from msp.allocators.fisher_rank import FisherRank, FisherRankLinear
from msp.allocators.ramp import Ramp
from msp.allocators.uniform import Uniform
from msp.engine.evolution import UNLIMITED, Evolution, EvolutionOptions
from msp.engine.state import Step
from msp.plan.levels import Levels


def search(problem: Problem, seeds: Sequence[Levels], options: EvolutionOptions) -> Allocated:
    """Run the evolution from ``seeds`` and report its generations to ``problem.progress``."""
    settings = problem.search
    if options.generations:  # a search without generations only chooses among its seeds
        options = replace(options, **settings.constants)
    options = options.limited(evaluations=settings.evaluations, tokens=settings.tokens)
    # The identity hashes every weight of the dense model, so it is computed before candidates replace them, and only
    # if there is a checkpoint.
    identity = problem.evidence.identity if settings.checkpoint is not None else None
    total = options.generations if options.generations < UNLIMITED else None
    with problem.evidence.fitness(options.token_shares) as fitness, problem.progress.stage("Search", total) as tell:

        def on_step(step: Step) -> None:
            tell(step.generation, best=step.best, candidates=step.evaluations, tokens=step.tokens)

        evolution = Evolution(
            problem.units,
            problem.budget,
            seeds,
            fitness,
            options=options,
            seed=problem.seed,
            checkpoint=settings.checkpoint,
            resume=settings.resume,
            identity=identity,
            on_step=on_step,
        )
        levels, history = evolution.run()
    last = history[-1]
    return Allocated(levels, last.evaluations, last.tokens, history, options)


def fisher_seeds(problem: Problem) -> list[Levels]:
    """The first individuals: block ranks at several spreads, linear ranks at a small spread, the ramp and uniform.

    The paper's map from traces to first levels is not public. With this one, the result is no worse on the fitness
    tokens than any allocation in the list.
    """
    makers: list[Allocator] = [FisherRank(spread) for spread in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)]
    makers += [FisherRankLinear(0.2), Ramp(), Uniform()]
    return [maker.allocate(problem).levels for maker in makers]


@register_allocator
@dataclass(frozen=True)
class Msp:
    """The published search with races over growing token counts, emptied blocks and measured sensitivities."""

    name: ClassVar[str] = "msp"

    def allocate(self, problem: Problem) -> Allocated:
        return search(problem, [*fisher_seeds(problem), *problem.hints], EvolutionOptions())
