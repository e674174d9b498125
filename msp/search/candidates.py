"""Puts candidate allocations into a live model and runs them: each costs a forward and one pass over what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from msp import ops
from msp.allocators.levels import Levels
from msp.evaluate import Reference, Sums
from msp.model import Linear, device_of
from msp.patterns import NMPattern, Unit
from msp.search.database import PackedLevels
from msp.search.fitness import Job

Ranks = Mapping[int, Tensor]
"""Of one linear, for every M it may have: uint8 ``[R, K]`` from ``ops.nm_rank``."""
Candidates = Mapping[str, Ranks] | Mapping[str, PackedLevels]
"""By linear, what candidates are made from: ranks, or its weights at every level."""


class RankedLinear(nn.Module):
    """A linear that keeps what a pattern keeps, by ranks or from a database, and can change its pattern at any time.

    Args:
        linear: the dense linear, left untouched.
        ranks: for every M of the patterns it will have; or its packed weights at these patterns.
    """

    def __init__(self, linear: Linear, ranks: Ranks | PackedLevels) -> None:
        super().__init__()
        self._dense = linear.weight.contiguous()
        self._bias = linear.bias
        self._ranks = ranks
        self._pattern: NMPattern | None = None
        self._kept: Tensor | None = None

    def keep(self, pattern: NMPattern) -> None:
        """Keep N of every M weights from now on."""
        if pattern != self._pattern and not pattern.is_dense and not pattern.is_empty:
            if self._kept is None:
                self._kept = torch.empty_like(self._dense)
            if isinstance(self._ranks, PackedLevels):
                ops.nm_unpack(self._ranks[pattern], out=self._kept)
            else:
                ops.nm_keep(self._dense, self._ranks[pattern.m], pattern.n, out=self._kept)
        self._pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        if self._pattern is None or self._pattern.is_dense:
            return functional.linear(x, self._dense, self._bias)
        if self._pattern.is_empty:
            empty = x.new_zeros(*x.shape[:-1], self._dense.shape[0])
            return empty if self._bias is None else empty + self._bias
        assert self._kept is not None
        return functional.linear(x, self._kept, self._bias)


class CandidateModel(AbstractContextManager["CandidateModel"]):
    """Within the context the units' linears are ranked; ``apply`` sets the level of every unit.

    Memory beyond the model: one byte a weight for the ranks of each M (what comes from a database stays on disk),
    and a second copy of the weights of the linears that are at a level between empty and dense.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[Linear],
        ranks: Candidates,
        units: Sequence[Unit],
    ) -> None:
        self.model = model
        self._linears = {linear.name: linear for linear in linears if linear.name in ranks}
        self._units = units
        self._ranked = {name: RankedLinear(linear, ranks[name]) for name, linear in self._linears.items()}

    def __enter__(self) -> CandidateModel:
        for name, ranked in self._ranked.items():
            self.model.set_submodule(name, ranked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, linear in self._linears.items():
            self.model.set_submodule(name, linear.module)

    def apply(self, levels: Sequence[int] | Levels) -> None:
        for unit, level in zip(self._units, levels, strict=True):
            for name in unit.linears:
                self._ranked[name].keep(unit.patterns[level])


def forward_in_bf16(model: nn.Module) -> bool:
    """Whether candidates' matrix products are computed in bf16: for an fp32 model on a CPU that has such products.

    That makes a forward about twice as fast on wiki6m and moves its KL by less than 2e-4, where candidates differ
    by 1e-2. Only the search does so: what is reported is measured in the model's own dtype.
    """
    own = next(model.parameters()).dtype
    return own == torch.float32 and device_of(model).type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def precision(model: nn.Module) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if forward_in_bf16(model) else nullcontext()


class LocalRunner:
    """Runs jobs in this process, one after another.

    Args:
        candidates: the model with ranked linears, entered.
        reference: the dense model's predictions on all fitness tokens, or the user's loss on them.
    """

    def __init__(self, candidates: CandidateModel, reference: Reference) -> None:
        self._candidates = candidates
        self._reference = reference

    @property
    def batches(self) -> int:
        return self._reference.batches

    def run(self, jobs: Sequence[Job]) -> list[Sums]:
        return [self._run(job) for job in jobs]

    def _run(self, job: Job) -> Sums:
        self._candidates.apply(job.levels)
        with precision(self._candidates.model):
            return self._reference.sums(self._candidates.model, job.batches)
