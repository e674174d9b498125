"""SparseGPT (arXiv 2301.00774): optimal brain surgeon, one column after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msp import ops
from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight
from msp.pruners.base import BasePruner, LinearStatistics, Scoring, Warn, named, register_pruner, tell


@register_pruner
@dataclass(frozen=True)
class SparseGPTPruner(BasePruner):
    """Removes weights in the order of their columns; the weights of later columns are updated to correct the error.

    The Hessian of the layer's squared output error is ``H = 2/tokens * sum x x^T``. Inputs that were never
    active (``H_jj = 0``) get ``H_jj = 1`` and their weights are zeroed; ``percdamp`` times the mean of the
    diagonal is added to it. If the result is not positive definite, the damping is raised tenfold, at most
    ``damping_raises`` times, and a warning names the linear.

    The mean is over the active inputs. The published code takes the mean over all inputs, including the 1 of each dead
    input: if 10 % of the inputs are dead and the others have a mean square of 0.005, it damps about eleven times as
    much. Without dead inputs both means are the same.

    The factorisation runs in float64: with the published damping the condition of H reaches 100 K, and
    float32 then loses more than the third digit. The sweep over the columns runs in float32.
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    updates_weights: ClassVar[bool] = True

    percdamp: float = 0.01
    block_size: int = 128
    damping_raises: int = 3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.percdamp) and self.percdamp > 0):
            raise UsageError(f"percdamp {self.percdamp} of pruner 'sparsegpt' must be a positive number")
        if self.block_size < 1:
            raise UsageError(f"block_size {self.block_size} of pruner 'sparsegpt' must be positive")
        if self.damping_raises < 0:
            raise UsageError(f"damping_raises {self.damping_raises} of pruner 'sparsegpt' must not be negative")

    def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
        """The score before any update of the weights: ``|w_ij| / sqrt([H^-1]_jj)``."""
        factor, dead = self._factor(weight, statistics, name="", warn=None)
        # H^-1 = U^T U, so its diagonal is the squared norm of U's columns.
        scale = torch.linalg.vector_norm(factor, dim=0).reciprocal()
        return Scoring(column_scale=torch.where(dead, 0.0, scale).float().to(weight.device))

    def prune(
        self, weight: Tensor, statistics: LinearStatistics, pattern: NMPattern, *, name: str = "", warn: Warn = None
    ) -> PackedWeight:
        (packed,) = self.prune_levels(weight, statistics, [pattern], name=name, warn=warn)
        return packed

    def prune_levels(
        self,
        weight: Tensor,
        statistics: LinearStatistics,
        patterns: Sequence[NMPattern],
        *,
        name: str = "",
        warn: Warn = None,
    ) -> Iterator[PackedWeight]:
        with named(name):
            # The factor does not depend on the pattern, so it is computed once.
            factor, dead = self._factor(weight, statistics, name=name, warn=warn)
            alive, single = weight.masked_fill(dead.to(weight.device), 0.0), factor.float().to(weight.device)
            for pattern in patterns:
                yield ops.obs_prune(alive, single, pattern, block_size=self.block_size)

    def _factor(self, weight: Tensor, statistics: LinearStatistics, *, name: str, warn: Warn) -> tuple[Tensor, Tensor]:
        """The upper Cholesky factor of H^-1, float64 ``[K, K]``, and the mask of dead inputs, bool ``[K]``."""
        columns = weight.shape[1]
        summed = self.require(statistics, "hessian", (columns, columns))
        if statistics.tokens < 1:
            raise MspError(f"pruner 'sparsegpt': the Hessian sums over {statistics.tokens} tokens")
        bad = int(summed.numel() - torch.isfinite(summed).sum())
        if bad:
            raise MspError(f"pruner 'sparsegpt': {bad} of the Hessian's {summed.numel()} entries are NaN or infinite")
        hessian = _wide(summed).mul_(2.0 / statistics.tokens)
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        # Dead inputs do not count in the mean of the others. If all inputs are dead, any positive mean serves.
        mean = diagonal[~dead].mean() if not dead.all() else 1.0
        diagonal[dead] = 1.0
        undamped = diagonal.clone()
        percdamp = self.percdamp
        for attempt in range(self.damping_raises + 1):
            diagonal.copy_(undamped + percdamp * mean)
            factor = inverse_cholesky(hessian)
            if factor is not None:
                return factor, dead
            if attempt < self.damping_raises:
                tell(
                    warn,
                    f"{name or 'a linear'}: the Hessian is not positive definite with damping {percdamp:g} "
                    f"of its mean diagonal; trying {10 * percdamp:g}",
                )
                percdamp *= 10
        raise MspError(f"the Hessian is not positive definite, even with damping {percdamp:g} of its mean diagonal")


def inverse_cholesky(hessian: Tensor) -> Tensor | None:
    """The upper triangular U with ``H^-1 = U^T U``, or None if H ``[K, K]`` is not positive definite.

    The published code factorises, inverts and factorises again. With rows and columns in reverse order one Cholesky
    factor is enough: ``J H J = L L^T`` gives ``H^-1 = (J L^-1 J)^T (J L^-1 J)``. The matrix J L^-1 J is upper
    triangular with a positive diagonal, and therefore equals U.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed.item() or not torch.isfinite(lower).all():
        return None
    # in column order, as LAPACK stores a matrix, so that the solution overwrites the identity
    inverse = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device).t()
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse.flip(0, 1)


def _wide(tensor: Tensor) -> Tensor:
    """A float64 copy, in host memory if the device has no float64."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64, copy=True)
