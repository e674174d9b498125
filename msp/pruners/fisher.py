"""Diagonal Fisher pruning: the loss a weight costs by a second-order estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msp.pruners.base import KeepingPruner, LinearStatistics, Scoring, register_pruner


@register_pruner
@dataclass(frozen=True)
class FisherPruner(KeepingPruner):
    """Score ``w^2 F``: optimal brain damage with the Hessian's diagonal taken from the empirical Fisher matrix."""

    name: ClassVar[str] = "fisher"
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})

    def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
        return Scoring(importance=self.require(statistics, "fisher", weight.shape))
