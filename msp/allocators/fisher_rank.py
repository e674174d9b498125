"""Density from the rank of the Fisher trace: the published sensitivity without the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from msp.allocators.base import Allocated, Problem, register_allocator


def rank_densities(sensitivities: Sequence[float], spread: float) -> list[float]:
    """Relative densities ``1 - spread ... 1 + spread``, linear in the rank of the sensitivity.

    Traces are heavy-tailed (the largest is 15-20 times the median). A map in proportion to them would saturate one unit
    and flatten the others; a map of the ranks does not (MixGPT, arXiv 2310.09499).
    """
    ranks = np.argsort(np.argsort(np.asarray(sensitivities), kind="stable"), kind="stable")
    last = max(len(ranks) - 1, 1)
    return [1 + spread * (2 * float(rank) / last - 1) for rank in ranks]


def unit_traces(problem: Problem) -> list[float]:
    """The Fisher trace of every unit: the sum of those of its linears."""
    traces = problem.evidence.fisher_traces()
    return [sum(traces[name] for name in unit.linears) for unit in problem.units]


@register_allocator
@dataclass(frozen=True)
class FisherRank:
    """Ranks the blocks by the sum of their linears' traces; all linears of a block share its density.

    The traces of different kinds of linears are not comparable, but the traces of whole blocks are.
    """

    name: ClassVar[str] = "fisher-rank"
    spread: float = 0.4

    def allocate(self, problem: Problem) -> Allocated:
        sums = [0.0] * problem.blocks
        for unit, trace in zip(problem.units, unit_traces(problem), strict=True):
            sums[unit.block] += trace
        densities = rank_densities(sums, self.spread)
        return problem.from_densities([densities[unit.block] for unit in problem.units])


@register_allocator
@dataclass(frozen=True)
class FisherRankLinear:
    """Ranks every unit by its own trace: with linears as units, one rank per linear."""

    name: ClassVar[str] = "fisher-rank-linear"
    spread: float = 0.4

    def allocate(self, problem: Problem) -> Allocated:
        return problem.from_densities(rank_densities(unit_traces(problem), self.spread))
