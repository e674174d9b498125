"""Magnitude pruning: keep the weights of largest absolute value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msp.pruners.base import KeepingPruner, LinearStatistics, Scoring, register_pruner


@register_pruner
@dataclass(frozen=True)
class MagnitudePruner(KeepingPruner):
    """Score ``|w|``: needs no calibration, and is the baseline of every other pruner."""

    name: ClassVar[str] = "magnitude"

    def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
        return Scoring()
