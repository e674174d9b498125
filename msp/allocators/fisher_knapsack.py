"""Levels that minimise the second-order loss predicted by the Fisher diagonal."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from msp.allocators.base import Allocated, Problem, register_allocator
from msp.plan.levels import cost, repair


@register_allocator
@dataclass(frozen=True)
class FisherKnapsack:
    """Greedy knapsack over ``1/2 sum F_i w_i^2`` of the pruned weights, per unit and level.

    The units rise along their lower convex hulls; the rise that saves the most loss per cost comes first. This is
    optimal up to the last step, which ``repair`` fills.
    """

    name: ClassVar[str] = "fisher-knapsack"

    def allocate(self, problem: Problem) -> Allocated:
        losses = problem.evidence.predicted_losses()
        curves = [np.sum([losses[name] for name in unit.linears], axis=0) for unit in problem.units]
        levels = np.zeros(len(curves), dtype=np.int64)
        left = problem.budget.limit - cost(levels, problem.units)
        offers = [offer for index in range(len(curves)) if (offer := _best_offer(problem, curves, index, 0))]
        heapq.heapify(offers)
        while offers:
            _, index, level = heapq.heappop(offers)
            costs = problem.units[index].costs
            price = costs[level] - costs[levels[index]]
            if price > left:
                continue
            left -= price
            levels[index] = level
            if offer := _best_offer(problem, curves, index, level):
                heapq.heappush(offers, offer)
        return Allocated(repair(levels, problem.units, problem.budget))


def _best_offer(problem: Problem, curves: list[np.ndarray], index: int, level: int) -> tuple[float, int, int] | None:
    """The jump from ``level`` with the steepest fall of the loss for its cost, as (-fall, unit, new level)."""
    curve, costs = curves[index], np.array(problem.units[index].costs)
    if level >= len(curve) - 1:
        return None
    falls = (curve[level] - curve[level + 1 :]) / (costs[level + 1 :] - costs[level])
    best = int(np.argmax(falls))
    return -float(falls[best]), index, level + 1 + best
