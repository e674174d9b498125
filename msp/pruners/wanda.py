"""Wanda (arXiv 2306.11695): weights times the norm of the inputs they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msp.pruners.base import KeepingPruner, LinearStatistics, Scoring, register_pruner


@register_pruner
@dataclass(frozen=True)
class WandaPruner(KeepingPruner):
    """Score ``|w_ij| * ||x_j||_2``, the norm over all calibration tokens."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"input_sum_squares"})

    def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
        return Scoring(column_scale=self.require(statistics, "input_sum_squares", weight.shape[1:]).sqrt())
