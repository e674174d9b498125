"""Density from the share of outlying Wanda scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from msp.allocators.base import Allocated, Problem, register_allocator


@register_allocator
@dataclass(frozen=True)
class Owl:
    """OWL (arXiv 2310.05175): blocks with more outliers keep more.

    A block's ratio D is the share of its Wanda scores above ``threshold`` times their mean; densities
    spread linearly over ``2 * width`` around the budget's. Defaults are the published ones.
    """

    name: ClassVar[str] = "owl"
    threshold: float = 5.0
    width: float = 0.08

    def allocate(self, problem: Problem) -> Allocated:
        ratios = np.asarray(problem.evidence.outlier_ratios(self.threshold))
        spread = float(np.ptp(ratios)) or 1.0
        shifted = (ratios - ratios.min()) / spread * 2 * self.width
        shifted -= shifted.mean()
        return problem.from_densities([1 + float(shifted[unit.block]) / problem.density for unit in problem.units])
