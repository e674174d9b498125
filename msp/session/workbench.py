"""The statistics of one model on one token set, for allocators and pruners, and the pruning to an allocation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msp import ops
from msp.allocators import Problem
from msp.base.host_memory import give_back
from msp.base.identity import Identity, environment, hashed, hashed_code, hashed_config, hashed_data, hashed_tensors
from msp.base.outputs import check_room
from msp.base.progress import Progress
from msp.compressions.base import Compression
from msp.compressions.nm import NMCompression
from msp.compressions.nm_database import LevelDatabase, PackedLevels
from msp.compressions.nm_ranks import Ranks
from msp.engine.candidates import HIDDEN_BYTES
from msp.engine.distributed import Workers
from msp.engine.fitness import Runner, windows_per_batch
from msp.engine.runners import Setting, open_runner
from msp.errors import UsageError
from msp.evidence.calibration import stream_statistics
from msp.evidence.evaluate import DenseReference, Reference
from msp.evidence.fisher import fisher_diagonals, fisher_traces
from msp.evidence.streamed import streamed_fisher_traces
from msp.evidence.task_loss import TaskLoss, TaskReference
from msp.formats.patterns import Allocation, NMPattern
from msp.models.as_loaded import StoredDtypes
from msp.models.gates import GatedModel
from msp.models.loading import LoadedModel
from msp.models.structure import Block, Linear, Structure, check_finite, device_of
from msp.ops import PackedWeight
from msp.ops._sums import ordered_sum
from msp.plan.plans import Plan, patterns_of
from msp.pruners import LinearStatistics, Pruner, get_pruner
from msp.pruners.base import named
from msp.session.options import Options
from msp.session.search_evidence import WorkbenchEvidence
from msp.session.writers import MemoryWriter, Writer
from msp.text.token_sets import TokenSets

# Tokens per forward: enough to use the whole device, few enough that activations stay small.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

# Fitness tokens per forward, at least: with fewer, a forward takes longer per token.
FITNESS_BATCH_TOKENS = 512

# A backward on a CPU that holds more bytes runs block by block, which costs one more forward.
ACTIVATION_BYTES = 128 << 20

# The number of tokens in the test whether blocks run one by one.
PROBED_TOKENS = 32
# The most names that a warning lists.
LISTED = 4
KEEP_HINT = "a search may empty them where its fitness tokens do not need them: pin them with keep, or give other text"


class Workbench:
    """A model, a plan and token sets. Statistics are computed at the first request, and kept.

    Args:
        model: the dense causal LM; after every call it is the dense model again.
        structure: the blocks of the model.
        plan: the units to prune, their patterns and the budget.
        tokens: calibration and fitness windows.
        name: the name of the model in messages.
        stored: the dtypes that packed values are rounded to before any measurement.
        device: the device on which single blocks are calibrated.
        progress: the progress display.
        hidden_bytes: the most bytes of hidden states that candidates share.
    """

    def __init__(
        self,
        model: Any,
        structure: Structure,
        plan: Plan,
        tokens: TokenSets,
        *,
        name: str,
        stored: StoredDtypes,
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
        self._stored = stored
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

    def problem(self, options: Options, pruner: Pruner, *, seed: int | None = None) -> Problem:
        """The problem that an allocator solves when ``pruner`` chooses the kept weights.

        With a level database, candidates have the weights that the pruner computes. Without it, they keep the dense
        weights that the pruner ranks first.

        Args:
            seed: the seed of the search, instead of the seed of ``options``.
        """
        evidence = WorkbenchEvidence(self, pruner, options.fitness, options.search, options.database_for(pruner))
        seed = options.seed if seed is None else seed
        return Problem(self.plan.units, self.plan.budget, evidence, seed, options.search, self.progress)

    @cached_property
    def whole(self) -> bool:
        """Whether blocks cannot run alone, so that each block costs a forward of the whole model."""
        with GatedModel(self.model, self.structure) as gates:
            reason = gates.why_not_one_by_one(self.tokens.calibration[:1, :PROBED_TOKENS])
        if reason is not None:
            _warn(f"{self.name}: blocks are not run one by one, but the whole model for each of them, since {reason}")
        return reason is not None

    @cached_property
    def unreached(self) -> frozenset[str]:
        """The linears that no calibration token reaches, so that only their weights are known.

        Examples are experts that the router never chooses, and weights that the model reads without calling the linear.
        They are pruned by magnitude. Allocators get the mean sensitivity of a weight for them.
        """
        structure = self.structure
        doubtful = {x.name for x in structure.linears if structure.failure is not None or x.name in structure.unreached}
        found = set[str]()
        if doubtful:
            label = "Looking for linears that no token reaches"
            for _, statistics in self._stream(frozenset(), sequential=False, only=doubtful, label=label):
                found |= {name for name, entry in statistics.items() if not entry.tokens}
        if found:
            why = "no calibration token comes to them, so they are pruned by magnitude"
            _warn(f"{_named(found)}: {why}; {KEEP_HINT}")
        return frozenset(found)

    def fisher_traces(self) -> Mapping[str, float]:
        """The Fisher trace of every linear; the attribute ``traces`` holds the measured traces after this call."""
        if self.traces is None:
            self.traces = self._measure_traces()
            give_back()
        sizes = {linear.name: linear.weight.numel() for linear in self.structure.linears}
        mean = _mean_of_weights(self.traces, sizes, self.unreached)
        return {name: mean * sizes[name] if name in self.unreached else trace for name, trace in self.traces.items()}

    def _measure_traces(self) -> dict[str, float]:
        too_large = backward_bytes(self.structure.linears, self.tokens.window) > ACTIVATION_BYTES
        if too_large and self._device.type == "cpu" and self._runs_backward_by_blocks:
            return self._traces_by_blocks(min(self._hidden_bytes, ACTIVATION_BYTES))
        with self.progress.stage("Fisher traces", len(self.tokens.calibration)) as advance:
            return fisher_traces(self.model, self.structure.linears, self.tokens.calibration, progress=advance)

    def _traces_by_blocks(self, hidden_bytes: int) -> dict[str, float]:
        return streamed_fisher_traces(
            self.model,
            self.structure,
            self.tokens.calibration,
            hidden_bytes=hidden_bytes,
            device=self._device,
            progress=self.progress,
        )

    @property
    def _runs_backward_by_blocks(self) -> bool:
        structure = self.structure
        alone = not any(linear.others for linear in structure.linears)
        return alone and not structure.remembering and not structure.changes.before and not self.whole

    def fisher_diagonals(self) -> Mapping[str, Tensor]:
        """The Fisher diagonal, ``[R, K]``, of every linear that is pruned.

        If a diagonal is zero everywhere, every weight gets the mean of the other diagonals.
        """
        if self._diagonals is None:
            with self.progress.stage("Fisher diagonals", len(self.tokens.calibration)) as advance:
                diagonals = fisher_diagonals(self.model, self.linears, self.tokens.calibration, progress=advance)
            sums = {name: float(ordered_sum(diagonal.double())) for name, diagonal in diagonals.items()}
            unknown = {name for name, total in sums.items() if not total}
            mean = _mean_of_weights(sums, {name: diagonal.numel() for name, diagonal in diagonals.items()}, unknown)
            for name in unknown:  # one value for all weights, so that magnitude alone ranks them
                diagonals[name].fill_(mean)
            self._diagonals = diagonals
        return self._diagonals

    def input_norms(self) -> Mapping[str, Tensor]:
        """The sum of squares, fp32 ``[K]``, of each input of every linear over the calibration tokens, dense model."""
        if self._norms is None:
            self.dense_ranks(None)
        assert self._norms is not None
        return self._norms

    def dense_ranks(self, pruner: Pruner | None) -> Mapping[str, Ranks]:
        """The rank codes of every pruned linear, for every M it may have, from the dense model's statistics.

        Without a pruner, only the input norms are measured.
        """
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
                    chosen, entry = self._serving(linear.name, entry, pruner)
                    scoring = chosen.scoring(linear.weight, entry)
                    weight = linear.weight.contiguous()
                    with named(linear.name):
                        ranks[linear.name] = {
                            size: ops.nm_rank(weight, size, **scoring.kwargs()).to(device_of(self.model))
                            for size in self.group_sizes(linear.name)
                        }
        self._norms = norms
        give_back()
        return ranks

    def group_sizes(self, name: str) -> set[int]:
        """Every M that the linear ``name`` may have."""
        return {pattern.m for pattern in patterns_of(self.unit_of[name])}

    def _room_for_ranks(self) -> MutableMapping[str, Ranks]:
        return {}

    def levels(self, pruner: Pruner, folder: Path, *, resume: bool = False) -> dict[str, PackedLevels]:
        """Every pruned linear at every level, from the dense model's statistics, in the database in ``folder``.

        Linears that the database lacks are computed; see ``LevelDatabase.open`` for ``resume``.
        """
        with self.progress.stage("Planning the level database") as tell:
            database = self.database(pruner, folder)
            removed = database.open(resume=resume)
            missing = database.missing()
            tell(1, bytes=database.nbytes, linears=len(self.linears), to_compute=len(missing))
        self.database_bytes = database.nbytes
        if removed:
            _warn(removed)
        if missing:
            label = "Level database"
            for block, statistics in self._stream(pruner.needs, sequential=False, only=missing, label=label):
                for linear in block.linears:
                    if linear.name in missing:
                        chosen, entry = self._serving(linear.name, statistics[linear.name], pruner)
                        weight, wanted = linear.weight.contiguous(), database.patterns[linear.name]
                        found = chosen.prune_levels(weight, entry, wanted, name=linear.name, warn=_warn)
                        database.write(linear.name, found)
        return database.read()

    def database(self, pruner: Pruner, folder: Path) -> LevelDatabase:
        """The level database in ``folder``, which is not opened yet."""
        shapes = {linear.name: linear.shape for linear in self.linears}
        patterns = {name: patterns_of(unit) for name, unit in self.unit_of.items()}
        dtypes = {name: self._stored.of_linear(name) for name in shapes}
        return LevelDatabase(folder, shapes, patterns, dtypes, self.origin(pruner))

    def origin(self, pruner: Pruner) -> Identity:
        """The identity of the levels of a database: the inputs that decide the result of ``pruner``."""
        code = type(self.model).__module__
        found = {"weights": self.weights, "model settings": hashed_config(self.model.config)}
        if not code.startswith("transformers."):
            found["sources of the model"] = hashed_code(type(self.model))
        found |= {"calibration tokens": hashed(self.tokens.calibration), "pruner": repr(pruner)}
        if not type(pruner).__module__.startswith("msp."):
            found["sources of the pruner"] = hashed_code(pruner)
        return {**found, **environment(self._device)}

    @property
    def stored_dtypes(self) -> str:
        """The hash of the dtypes that packed values are rounded to."""
        return hashed_data({linear.name: self._stored.of_linear(linear.name) for linear in self.linears})

    @cached_property
    def weights(self) -> str:
        """The hash of all tensors of the model, as a checkpoint holds them but in the dtypes of the computation."""
        return hashed_data(self._hashed_weights())

    def _hashed_weights(self) -> dict[str, str]:
        state = self.model.state_dict(keep_vars=True)
        before = self.structure.changes.before
        return hashed_tensors({name: before.get(name, tensor) for name, tensor in state.items()})

    def reference(self, fitness: str | TaskLoss = "kl") -> Reference:
        """The dense model's predictions on the fitness tokens, or the measure by the user's loss on them.

        Raises:
            UsageError: there are no fitness tokens.
        """
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
        """The dense model's predictions on ``windows [S, T]``, with the batch size of the calibration by default."""
        size = batch_size or self._batch_size
        return DenseReference(self.model, windows, batch_size=size, progress=self.progress, label=label)

    def runner(
        self, compression: Compression, reference: Reference, workers: Workers | None = None
    ) -> AbstractContextManager[Runner]:
        """The runner of candidates on the fitness tokens, in this process or on ``workers``."""
        setting = Setting(self.model, self.structure, compression, self.plan.units, reference, self._hidden_bytes)
        return open_runner(setting, workers, self.progress)

    def writer(
        self, loaded: LoadedModel, output: str | Path | None, *, force: bool, size: int
    ) -> AbstractContextManager[Writer]:
        """What prunes the model to an allocation and writes it to ``output``, where there is room for ``size`` bytes.

        Raises:
            MspError: there is no room.
        """
        if output is not None:
            check_room(output, size, "the packed model")
        return MemoryWriter(self, loaded, output, force)

    @contextmanager
    def pruned(self, allocation: Allocation, pruner: Pruner, *, stays: Callable[[], bool] = bool) -> Iterator[Any]:
        """Within the context the model is pruned, block by block; each block is calibrated after the pruned blocks.

        The linears are ``SparseLinear`` within the context. When it ends, the dense model is restored, unless ``stays``
        returns true.
        """
        with ExitStack() as stack:
            for block, statistics in self._stream(pruner.needs, sequential=True):
                stack.enter_context(self.packed(block, statistics, allocation, pruner, stays))
                del statistics  # before the statistics of the next block are made
                give_back()  # packed weights lie in the heap between blocks of memory that calibration frees
            yield self.model

    @contextmanager
    def packed(
        self,
        block: Block,
        statistics: Mapping[str, LinearStatistics],
        allocation: Allocation,
        pruner: Pruner,
        stays: Callable[[], bool] = bool,
    ) -> Iterator[None]:
        """Within the context, or for good if ``stays`` returns true, the linears of ``block`` are ``SparseLinear``."""
        modules = self._settled(block, statistics, allocation, pruner)
        # this frame lives until the model is dense again, and the Hessians of all blocks exceed the model
        del statistics
        with self.structure.replaced(modules, stays):
            yield

    def _settled(
        self, block: Block, statistics: Mapping[str, LinearStatistics], allocation: Allocation, pruner: Pruner
    ) -> dict[str, nn.Module]:
        """The pruned modules of ``block``, by name."""

        def pruned(linear: Linear, pattern: NMPattern) -> PackedWeight:
            chosen, entry = self._serving(linear.name, statistics[linear.name], pruner)
            packed = chosen.prune(linear.weight.contiguous(), entry, pattern, name=linear.name, warn=_warn)
            return self._rounded(packed, self._stored.of_linear(linear.name))

        compression, found = NMCompression(self.structure, pruned=pruned), dict[str, nn.Module]()
        for unit in self.plan.units:
            if unit.block == block.index:
                found |= compression.settle(unit, patterns_of(unit).index(allocation[unit.linears[0]]))
        return found

    def _rounded(self, packed: PackedWeight, stored: torch.dtype) -> PackedWeight:
        computed = packed.dtype
        if stored != computed:
            packed = packed.to(dtype=stored)
        return packed.to(device_of(self.model), computed)

    def _stream(
        self, needs: frozenset[str], *, sequential: bool, only: Container[str] | None = None, label: str = ""
    ) -> Iterator[tuple[Any, Mapping[str, LinearStatistics]]]:
        if "fisher" in needs:
            self.fisher_diagonals()  # they need the whole model, which is not available while blocks stream
        return stream_statistics(
            self.model,
            self.structure,
            self.tokens.calibration,
            needs,
            sequential=sequential,
            only=only,
            batch_size=self._batch_size,
            device=self._device,
            whole=self.whole,
            progress=self.progress,
            label=label or ("Pruning" if sequential else "Calibrating"),
        )

    def _serving(self, name: str, entry: LinearStatistics, pruner: Pruner) -> tuple[Pruner, LinearStatistics]:
        """The pruner of a linear and its statistics; the pruner is magnitude if the statistics rank no weight."""
        if "fisher" in pruner.needs:
            entry.fisher = self.fisher_diagonals()[name].to(self._device)
            entry.sequences = len(self.tokens.calibration)
        if not pruner.needs or name in self.unreached:
            return get_pruner("magnitude") if name in self.unreached else pruner, entry
        if entry.say_nothing(pruner.needs - {"fisher"}):
            if not entry.tokens:  # a router may choose other experts after the pruned blocks
                _warn(f"{name}: no calibration token comes to it any more, so it is pruned by magnitude")
            return get_pruner("magnitude"), entry
        return pruner, entry


def backward_bytes(linears: Iterable[Linear], window: int) -> int:
    """An estimate of the bytes that a backward of a window holds.

    It counts the input and output of each linear in fp32, and as many bytes again for the values between the linears.
    """
    return 2 * 4 * window * sum(sum(linear.shape) * len(linear.places) for linear in linears)


def batch_size(device: torch.device, window: int) -> int:
    """Sequences per forward on ``device``."""
    return max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // window)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _named(names: Iterable[str]) -> str:
    """The first of ``names``, and the number of the others."""
    first, more = sorted(names)[:LISTED], len(set(names)) - LISTED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _mean_of_weights(totals: Mapping[str, float], sizes: Mapping[str, int], without: Container[str]) -> float:
    """The mean per weight of ``totals``, which holds one sum per linear; the linears in ``without`` are left out."""
    counted = [name for name in totals if name not in without]
    return sum(totals[name] for name in counted) / max(sum(sizes[name] for name in counted), 1)
