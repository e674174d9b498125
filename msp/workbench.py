"""Everything known about one model on one token set: what allocators ask, and pruning to an answer."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msp import ops
from msp.allocators import Problem, SearchSettings
from msp.calibration import stream_statistics
from msp.data import TokenSets
from msp.errors import UsageError
from msp.evaluate import DenseReference, Reference
from msp.model import Block, Structure, check_finite, device_of
from msp.ops import PackedWeight
from msp.patterns import Allocation
from msp.plan import Plan
from msp.progress import Progress
from msp.pruners import LinearStatistics, Pruner
from msp.search.candidates import HIDDEN_BYTES, Candidates, Ranks, forward_in_bf16
from msp.search.database import LevelDatabase, PackedLevels
from msp.search.distributed import Workers
from msp.search.evolution import Fitness
from msp.search.fitness import Runner, TokenFitness, windows_per_batch
from msp.search.runners import Setting, open_runner
from msp.sensitivity import fisher_diagonals, fisher_traces
from msp.sparse_linear import SparseLinear
from msp.task_loss import TaskLoss, TaskReference, fitness_name

# Tokens per forward: enough to fill a machine, few enough that activations stay small.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

# Of fitness tokens: shorter batches take longer a token.
FITNESS_BATCH_TOKENS = 512


class Workbench:
    """A model, a plan and token sets. Statistics are computed when asked for, and kept.

    Args:
        model: the dense causal LM; between calls it is always the dense model again.
        structure, plan: its blocks, and what of them is pruned.
        tokens: calibration and fitness windows.
        name: names the model in checkpoints of the search.
        stored_dtype: dtype that packed values are rounded to before anything is measured.
        device: where single blocks are calibrated.
        hidden_bytes: what the hidden states of candidates may take.
    """

    def __init__(
        self,
        model: Any,
        structure: Structure,
        plan: Plan,
        tokens: TokenSets,
        *,
        name: str,
        stored_dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
        hidden_bytes: int = HIDDEN_BYTES,
    ) -> None:
        self.model = model
        self.structure = structure
        self.plan = plan
        self.tokens = tokens
        self.progress = progress
        self.name = name
        self._stored_dtype = stored_dtype
        self._device = device
        self._hidden_bytes = hidden_bytes
        self._batch_size = batch_size(device, tokens.window)
        self.unit_of = {name: unit for unit in plan.units for name in unit.linears}
        self.linears = [linear for linear in structure.linears if linear.name in self.unit_of]
        self.traces: dict[str, float] | None = None
        self.database_bytes: int | None = None
        self._diagonals: dict[str, Tensor] | None = None
        self._norms: dict[str, Tensor] | None = None
        self._reference: DenseReference | None = None

    def problem(
        self,
        pruner: Pruner,
        *,
        seed: int,
        fitness: str | TaskLoss,
        search: SearchSettings,
        database: bool = False,
    ) -> Problem:
        """What an allocator is asked to solve when ``pruner`` decides which weights stay.

        With ``database`` candidates have the weights that the pruner gives them, otherwise those that it ranks first.
        """
        evidence = WorkbenchEvidence(self, pruner, fitness, search, database)
        return Problem(self.plan.units, self.plan.budget, evidence, seed, search, self.progress)

    def fisher_traces(self) -> Mapping[str, float]:
        """Fisher trace of every linear; ``traces`` holds them once they were asked for."""
        if self.traces is None:
            self.traces = self._measure_traces()
        return self.traces

    def _measure_traces(self) -> dict[str, float]:
        with self.progress.stage("Fisher traces", len(self.tokens.calibration)) as advance:
            return fisher_traces(self.model, self.structure.linears, self.tokens.calibration, progress=advance)

    def fisher_diagonals(self) -> Mapping[str, Tensor]:
        if self._diagonals is None:
            with self.progress.stage("Fisher diagonals", len(self.tokens.calibration)) as advance:
                self._diagonals = fisher_diagonals(self.model, self.linears, self.tokens.calibration, progress=advance)
        return self._diagonals

    def input_norms(self) -> Mapping[str, Tensor]:
        """Per linear: the sum of squares of every input over the calibration tokens, in the dense model."""
        if self._norms is None:
            self.dense_ranks(None)
        assert self._norms is not None
        return self._norms

    def dense_ranks(self, pruner: Pruner | None) -> Mapping[str, Ranks]:
        """Rank codes of every pruned linear, for every M it may have, with the dense model's statistics."""
        ranks: MutableMapping[str, Ranks] = {} if pruner is None else self._room_for_ranks()
        needs = (pruner.needs if pruner else frozenset()) | {"input_sum_squares"}
        norms: dict[str, Tensor] = {}
        for block, statistics in self._stream(needs, sequential=False):
            check_finite(block.linears)
            for linear in block.linears:
                entry = statistics[linear.name]
                assert entry.input_sum_squares is not None
                norms[linear.name] = entry.input_sum_squares.cpu()
                if pruner is not None and linear.name in self.unit_of:
                    scoring = pruner.scoring(linear.weight, self._complete(linear.name, entry, pruner))
                    weight = linear.weight.contiguous()
                    ranks[linear.name] = {
                        size: ops.nm_rank(weight, size, **scoring.kwargs()).to(device_of(self.model))
                        for size in self.group_sizes(linear.name)
                    }
        self._norms = norms
        return ranks

    def group_sizes(self, name: str) -> set[int]:
        """Every M that the linear ``name`` may have."""
        return {pattern.m for pattern in self.unit_of[name].patterns}

    def _room_for_ranks(self) -> MutableMapping[str, Ranks]:
        return {}

    def levels(self, pruner: Pruner, folder: Path, *, resume: bool = False) -> dict[str, PackedLevels]:
        """Every pruned linear at every level, with the dense model's statistics: from the database in ``folder``.

        What the database lacks is computed; see ``LevelDatabase.open`` for ``resume``.
        """
        shapes = {linear.name: linear.shape for linear in self.linears}
        patterns = {name: unit.patterns for name, unit in self.unit_of.items()}
        with self.progress.stage("Planning the level database") as tell:
            database = LevelDatabase(folder, shapes, patterns, self._stored_dtype, self._origin(pruner))
            removed = database.open(resume=resume)
            missing = database.missing()
            tell(1, bytes=database.nbytes, linears=len(shapes), to_compute=len(missing))
        self.database_bytes = database.nbytes
        if removed:
            _warn(removed)
        if missing:
            label = "Level database"
            for block, statistics in self._stream(pruner.needs, sequential=False, only=missing, label=label):
                for linear in block.linears:
                    if linear.name in missing:
                        entry = self._complete(linear.name, statistics[linear.name], pruner)
                        weight, wanted = linear.weight.contiguous(), database.patterns[linear.name]
                        found = pruner.prune_levels(weight, entry, wanted, name=linear.name, warn=_warn)
                        database.write(linear.name, found)
        return database.read()

    def _origin(self, pruner: Pruner) -> dict[str, str]:
        """What a database depends on beside its levels."""
        weights, calibration = hashlib.sha256(), self.tokens.calibration
        for name, tensor in self.model.state_dict().items():
            weights.update(name.encode())
            weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        digest = hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
        return {
            "model": self.name,
            "weights": weights.hexdigest(),
            "calibration tokens": f"{list(calibration.shape)} {digest}",
            "pruner": repr(pruner),
        }

    def reference(self, fitness: str | TaskLoss = "kl") -> Reference:
        """The dense model's predictions on the fitness tokens; or what measures by a loss of the user's there."""
        if not len(self.tokens.fitness):
            raise UsageError("this allocator searches, and there are no fitness tokens to search on")
        if not isinstance(fitness, str):
            return TaskReference(self.tokens.fitness, fitness, batch_size=self._fitness_batch)
        if self._reference is None:
            label = "Dense predictions"
            self._reference = self.predictions(self.tokens.fitness, label, batch_size=self._fitness_batch)
        return self._reference

    @property
    def _fitness_batch(self) -> int:
        least = max(1, FITNESS_BATCH_TOKENS // self.tokens.window)
        return windows_per_batch(len(self.tokens.fitness), least, self._batch_size)

    def predictions(self, windows: Tensor, label: str, *, batch_size: int | None = None) -> DenseReference:
        """The dense model's predictions on ``windows [S, T]``, kept by batches of as many as calibrate together."""
        size = batch_size or self._batch_size
        return DenseReference(self.model, windows, batch_size=size, progress=self.progress, label=label)

    def runner(
        self, candidates: Candidates, reference: Reference, workers: Workers | None = None
    ) -> AbstractContextManager[Runner]:
        """Runs candidates on the fitness tokens, here or on ``workers``."""
        setting = Setting(self.model, self.structure, candidates, self.plan.units, reference, self._hidden_bytes)
        return open_runner(setting, workers, self.progress)

    @contextmanager
    def pruned(self, allocation: Allocation, pruner: Pruner) -> Iterator[Any]:
        """The model pruned block by block, each block calibrated behind its pruned predecessors.

        The linears become ``SparseLinear`` for the length of the context; the dense model is then restored.
        """
        with ExitStack() as stack:
            for block, statistics in self._stream(pruner.needs, sequential=True):
                stack.enter_context(self.packed(block, statistics, allocation, pruner))
            yield self.model

    @contextmanager
    def packed(
        self, block: Block, statistics: Mapping[str, LinearStatistics], allocation: Allocation, pruner: Pruner
    ) -> Iterator[None]:
        """Within the context the linears of ``block`` are pruned, and ``SparseLinear``."""
        replaced = []
        try:
            for linear in block.linears:
                if linear.name not in self.unit_of or allocation[linear.name].is_dense:
                    continue
                entry = self._complete(linear.name, statistics[linear.name], pruner)
                pattern = allocation[linear.name]
                packed = pruner.prune(linear.weight.contiguous(), entry, pattern, name=linear.name, warn=_warn)
                packed = self._rounded(packed)
                block.module.set_submodule(linear.kind, SparseLinear.from_packed(packed, linear.bias))
                replaced.append(linear)
            yield
        finally:
            for linear in replaced:
                block.module.set_submodule(linear.kind, linear.module)

    def _rounded(self, packed: PackedWeight) -> PackedWeight:
        computed = packed.dtype
        return packed.to(dtype=self._stored_dtype).to(dtype=computed, device=device_of(self.model))

    def _stream(
        self, needs: frozenset[str], *, sequential: bool, only: Container[str] | None = None, label: str = ""
    ) -> Iterator[tuple[Any, Mapping[str, LinearStatistics]]]:
        if "fisher" in needs:
            self.fisher_diagonals()  # needs the whole model, which is not there while blocks stream
        return stream_statistics(
            self.model,
            self.structure,
            self.tokens.calibration,
            needs,
            sequential=sequential,
            only=only,
            batch_size=self._batch_size,
            device=self._device,
            progress=self.progress,
            label=label or ("Pruning" if sequential else "Calibrating"),
        )

    def _complete(self, name: str, statistics: LinearStatistics, pruner: Pruner) -> LinearStatistics:
        if "fisher" in pruner.needs:
            statistics.fisher = self.fisher_diagonals()[name].to(self._device)
            statistics.sequences = len(self.tokens.calibration)
        return statistics


class WorkbenchEvidence:
    """Answers an allocator's questions about a workbench's model under one pruner.

    Args:
        search: where its checkpoint is, and on which workers it runs.
        database: whether candidates come from a level database, which then lies beside the checkpoint; without one,
            in a temporary folder for as long as this object lives.
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
        self._levels: dict[str, PackedLevels] | None = None
        self._ranks: Mapping[str, Ranks] | None = None

    @property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for windows in (self._bench.tokens.calibration, self._bench.tokens.fitness):
            digest.update(windows.numpy().tobytes())
        forward = "bf16" if forward_in_bf16(self._bench.model) else "own dtype"
        fitness = fitness_name(self._fitness)
        database = "|database" if self._database else ""
        return f"{self._bench.name}|{self._pruner!r}|{fitness}|{forward}|{digest.hexdigest()}{database}"

    def fisher_traces(self) -> Mapping[str, float]:
        return self._bench.fisher_traces()

    def outlier_ratios(self, threshold: float) -> Sequence[float]:
        norms = self._bench.input_norms()
        ratios = []
        for block in self._bench.structure.blocks:
            with block.on(device_of(self._bench.model)):
                scores = [
                    linear.weight.float().abs() * norms[linear.name].sqrt().to(linear.weight)
                    for linear in block.linears
                ]
            count = sum(score.numel() for score in scores)
            mean = sum(float(score.double().sum()) for score in scores) / max(count, 1)
            above = sum(int((score > threshold * mean).sum()) for score in scores)
            ratios.append(above / max(count, 1))
        return ratios

    def ranks(self) -> Mapping[str, Ranks]:
        if self._ranks is None:
            self._ranks = self._bench.dense_ranks(self._pruner)
        return self._ranks

    def candidates(self) -> Candidates:
        """What candidates are made from: ranks, or every linear at every level."""
        if not self._database:
            return self.ranks()
        if self._levels is None:
            if self._search.checkpoint is not None:
                folder = self._search.checkpoint.with_name("database")
            else:
                folder = Path(tempfile.mkdtemp(prefix="msp-database-"))
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._levels = self._bench.levels(self._pruner, folder, resume=self._search.resume)
        return self._levels

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
            # Keeping n weights prunes the ranks n and above.
            patterns = self._bench.unit_of[linear.name].patterns
            losses[linear.name] = [float(per_rank[pattern.m][pattern.n :].sum()) for pattern in patterns]
        return losses

    @contextmanager
    def fitness(self, shares: Sequence[float]) -> Iterator[Fitness]:
        reference = self._bench.reference(self._fitness)
        with self._bench.runner(self.candidates(), reference, self._search.workers) as runner:
            yield TokenFitness(runner, measure=fitness_name(self._fitness), shares=shares)


def batch_size(device: torch.device, window: int) -> int:
    """Sequences per forward on ``device``."""
    return max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // window)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
