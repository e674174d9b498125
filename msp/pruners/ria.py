"""RIA, relative importance and activations ("Plug-and-Play", ICLR 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msp.errors import UsageError
from msp.pruners.base import KeepingPruner, LinearStatistics, Scoring, register_pruner


@register_pruner
@dataclass(frozen=True)
class RIAPruner(KeepingPruner):
    """Score ``(|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||_2^exponent``.

    A weight counts by its share of its column and of its row, so no channel is emptied as a whole.
    The published exponent is 0.5. The channel permutation that is published with this score, which reorders the input
    channels before the N:M groups are formed, is not part of this pruner: published figures with it are better.
    """

    name: ClassVar[str] = "ria"
    needs: ClassVar[frozenset[str]] = frozenset({"input_sum_squares"})

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.exponent) and self.exponent >= 0):
            raise UsageError(f"exponent {self.exponent} of pruner 'ria' must be 0 or a positive number")

    def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
        sum_squares = self.require(statistics, "input_sum_squares", weight.shape[1:])
        magnitude = weight.float().abs()
        return Scoring(
            row_term=_reciprocal(magnitude.sum(1)),
            column_term=_reciprocal(magnitude.sum(0)),
            column_scale=sum_squares.pow(self.exponent / 2),
        )


def _reciprocal(sums: Tensor) -> Tensor:
    """1 / sums, and 0 for a row or column of zeros, whose weights score 0 with any factor."""
    return torch.where(sums > 0, sums.reciprocal(), 0.0)
