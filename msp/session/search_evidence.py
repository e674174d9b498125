"""The answers of a workbench to the questions of an allocator, for one pruner and one fitness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from msp.allocators import SearchSettings
from msp.base.host_memory import give_back
from msp.base.identity import Identity, hashed, hashed_code
from msp.base.staging import scratch_folder
from msp.compressions.nm import Candidates, NMCompression
from msp.compressions.nm_database import DATABASE, PackedLevels
from msp.compressions.nm_ranks import Ranks
from msp.engine.candidates import forward_in_bf16
from msp.engine.evolution import Fitness
from msp.engine.fitness import TokenFitness
from msp.evidence.task_loss import TaskLoss, fitness_name
from msp.models.structure import device_of
from msp.ops._sums import ordered_sum
from msp.plan.plans import patterns_of
from msp.pruners import Pruner

if TYPE_CHECKING:
    from msp.session.workbench import Workbench


class WorkbenchEvidence:
    """The evidence about the model of a workbench, under one pruner, that an allocator asks for.

    Args:
        bench: the workbench.
        pruner: the pruner that chooses the kept weights.
        fitness: the measure that a search minimises.
        search: the settings of the search, with the path of its checkpoint and its workers.
        database: whether candidates come from a level database. The database lies in the folder of the checkpoint. If
            there is no checkpoint, it lies in a temporary folder that exists as long as this object.
    """

    def __init__(
        self,
        bench: Workbench,
        pruner: Pruner,
        fitness: str | TaskLoss,
        search: SearchSettings,
        database: bool = False,
    ) -> None:
        self._bench = bench
        self._pruner = pruner
        self._fitness = fitness
        self._search = search
        self._database = database
        self._compression = NMCompression(bench.structure, database=database)
        self._levels: dict[str, PackedLevels] | None = None
        self._ranks: Mapping[str, Ranks] | None = None

    @property
    def identity(self) -> Identity:
        bench = self._bench
        found = {**bench.origin(self._pruner), "dtypes that weights are stored in": bench.stored_dtypes}
        found |= {"fitness tokens": hashed(bench.tokens.fitness), "fitness": fitness_name(self._fitness)}
        if not isinstance(self._fitness, str):
            found["sources of the fitness"] = hashed_code(self._fitness)
        found |= self._compression.identity
        found["products of candidates"] = "bf16" if forward_in_bf16(bench.model) else "as the model's"
        return found

    def fisher_traces(self) -> Mapping[str, float]:
        return self._bench.fisher_traces()

    def outlier_ratios(self, threshold: float) -> Sequence[float]:
        norms, unreached = self._bench.input_norms(), self._bench.unreached
        ratios = []
        for block in self._bench.structure.blocks:
            with block.on(device_of(self._bench.model)):
                scores = [
                    linear.weight.float().abs() * norms[linear.name].sqrt().to(linear.weight.device)
                    for linear in block.linears
                    if linear.name not in unreached
                ]
            count = sum(score.numel() for score in scores)
            mean = sum(float(ordered_sum(score.double())) for score in scores) / max(count, 1)
            above = sum(int((score > threshold * mean).sum()) for score in scores)
            ratios.append(above / max(count, 1))
        return ratios

    def ranks(self) -> Mapping[str, Ranks]:
        if self._ranks is None:
            self._ranks = self._bench.dense_ranks(self._pruner)
        return self._ranks

    def candidates(self) -> Candidates:
        """The source of candidates: the ranks, or the packed weights of every linear at every level."""
        if not self._database:
            return self.ranks()
        if self._levels is None:
            if self._search.checkpoint is not None:
                folder = self._search.checkpoint.with_name(DATABASE)
            else:
                folder = scratch_folder(self, "database")
            self._levels = self._bench.levels(self._pruner, folder, resume=self._search.resume)
        return self._levels

    def release(self) -> None:
        self._ranks = self._levels = None
        give_back()

    def predicted_losses(self) -> Mapping[str, Sequence[float]]:
        ranks, diagonals = self.ranks(), self._bench.fisher_diagonals()
        losses = {}
        for linear in self._bench.linears:
            cost = linear.weight.float().square().cpu() * diagonals[linear.name].cpu() / 2
            per_rank = {
                size: torch.zeros(size, dtype=torch.float64).scatter_add_(
                    0, rank.cpu().flatten().long(), cost.double().flatten()
                )
                for size, rank in ranks[linear.name].items()
            }
            # A pattern that keeps n weights prunes the ranks n and above.
            patterns = patterns_of(self._bench.unit_of[linear.name])
            losses[linear.name] = [float(per_rank[pattern.m][pattern.n :].sum()) for pattern in patterns]
        return losses

    @contextmanager
    def fitness(self, shares: Sequence[float]) -> Iterator[Fitness]:
        reference = self._bench.reference(self._fitness)
        compression = replace(self._compression, source=self.candidates())
        with self._bench.runner(compression, reference, self._search.workers) as runner:
            yield TokenFitness(runner, measure=fitness_name(self._fitness), shares=shares)
