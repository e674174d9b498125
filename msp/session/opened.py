"""A model opened for work: its structure, its token sets, its plan, and where it runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from msp.base.finite import check_finite, named_tensors
from msp.base.identity import differences
from msp.base.progress import Progress
from msp.base.readable import dtype_name
from msp.errors import MspError, UsageError
from msp.evidence.decode_times import machine, measure_decode
from msp.evidence.evaluate import DenseReference
from msp.formats.patterns import Allocation
from msp.formats.storage import DENSE, Storage
from msp.models.as_loaded import StoredDtypes
from msp.models.loading import LoadedModel, find_device, load_model
from msp.models.stored import load_stored, read_skeleton
from msp.models.structure import Structure, device_of, find_structure
from msp.plan.decode_table import DecodeTable
from msp.plan.plans import Goal, Plan, make_plan
from msp.session.footprint import held_bytes, hidden_bytes
from msp.session.options import Options
from msp.session.prunable import check_prunable
from msp.session.streamed_workbench import StreamedWorkbench
from msp.session.workbench import Workbench, batch_size
from msp.text.token_sets import TokenSets, make_token_sets


@dataclass
class Opened:
    """A dense model with its structure and where it runs."""

    loaded: LoadedModel
    structure: Structure
    device: torch.device
    decode_table: DecodeTable | None = None
    streamed: bool = False

    @property
    def model(self) -> Any:
        return self.loaded.model

    def tokens(self, options: Options, seed: int) -> TokenSets:
        return make_token_sets(
            options.calibration,
            self.loaded.tokenizer,
            vocabulary_size(self.model),
            evaluate=options.evaluate,
            window=window_of(self.model, options.window),
            calibration_tokens=options.calibration_tokens,
            fitness_tokens=options.fitness_tokens,
            # The perplexity of random tokens says nothing; the divergence from the dense model does.
            fitness_noise=options.fitness_noise if options.fitness == "kl" else 0.0,
            test_tokens=options.test_tokens,
            seed=seed,
        )

    def plan(self, options: Options, progress: Progress) -> Plan:
        return make_plan(self.structure, self._goal(options, progress), options.rules, unit=options.unit)

    def _goal(self, options: Options, progress: Progress) -> Goal:
        """The goal of ``options``, with the facts about this model that turn it into a limit."""
        goal = options.goal
        if goal.objective == "nanoseconds":
            return replace(goal, table=self._measured(options, progress))
        if goal.objective == "bytes":
            return replace(goal, other_bytes=self._other_bytes(), stored=self.loaded.stored)
        return goal

    def _measured(self, options: Options, progress: Progress) -> DecodeTable:
        """The table of ``options``, or one measured now; for a search that resumes, the one it began with.

        Raises:
            MspError: that one was measured on another machine, or with other threads or versions.
        """
        shapes, dtype = [linear.shape for linear in self.structure.linears], self.loaded.stored_dtype
        kept = None if options.work_dir is None else options.work_dir / "decode-table.json"
        if options.decode_table is not None:
            self.decode_table = options.decode_table
        elif options.resume and kept is not None and kept.exists():
            self.decode_table = DecodeTable.load(kept)
            self._check_machine(self.decode_table, kept)
        if self.decode_table is None:
            patterns = options.rules.patterns
            self.decode_table = measure_decode(shapes, patterns, dtype=dtype, device=self.device, progress=progress)
            if kept is not None:
                self.decode_table.save(kept)
        if self.decode_table.dtype != dtype_name(dtype):
            raise UsageError(f"the decode table is of {self.decode_table.dtype}, but the model is stored in {dtype}")
        return self.decode_table.rounded(shapes)

    def _check_machine(self, table: DecodeTable, file: str | Path) -> None:
        now = {name: str(value) for name, value in machine(self.device).items()}
        was = {name: str(value) for name, value in table.machine.items()}
        if differs := differences({name: now[name] for name in now if name in was}, was):
            raise MspError(
                f"{file} was not measured here: {'; '.join(differs)}; to go on with its times give it as decode_table, "
                "or start anew without resume"
            )

    def _other_bytes(self) -> int:
        """Of the tensors that are no weight of a linear, as stored."""
        stored = self.loaded.stored
        in_linears = sum(
            DENSE.nbytes(*linear.shape, stored.of_linear(linear.name)) for linear in self.structure.linears
        )
        return stored.nbytes(self.model) - in_linears

    def bytes_of(self, allocation: Allocation) -> dict[str, int]:
        """Of all tensors as stored, of the dense model and of one packed to ``allocation``."""
        goal = Goal(None, 0, self._other_bytes(), self.loaded.stored)
        storages = {name: Storage(pattern) for name, pattern in allocation.items()}
        linears = sum(goal.cost(linear, storages.get(linear.name, DENSE)) for linear in self.structure.linears)
        return {"dense": self.loaded.stored.dense_bytes, "packed": goal.other_bytes + linears}

    def expected_bytes(self, plan: Plan) -> int:
        """About what a model packed to ``plan`` takes, at least, before its allocation is known."""
        if plan.objective == "bytes":
            return min(plan.limit, self.loaded.stored.dense_bytes)
        if plan.objective == "weights":
            least = min(self.loaded.stored.of_linear(linear.name).itemsize for linear in self.structure.linears)
            return self._other_bytes() + plan.limit * least
        return self._other_bytes()

    def bench(self, plan: Plan, tokens: TokenSets, options: Options, progress: Progress) -> Workbench:
        about: dict[str, Any] = {
            "name": self.loaded.source,
            "stored": self.loaded.stored,
            "device": self.device,
            "progress": progress,
            "hidden_bytes": hidden_bytes(options, held_bytes(self.model)),
        }
        if self.streamed:
            return StreamedWorkbench(self.model, self.structure, plan, tokens, folder=options.work_dir, **about)
        return Workbench(self.model, self.structure, plan, tokens, **about)

    def test_reference(self, tokens: TokenSets, progress: Progress) -> DenseReference:
        size = batch_size(self.device, tokens.window)
        return DenseReference(
            self.model, tokens.test, batch_size=size, progress=progress, label="Dense test predictions"
        )


def open_model(model: Any, options: Options, tokenizer: Any, progress: Progress, *, may_stream: bool = False) -> Opened:
    """Load ``model``, or take the object as it is, and look at what there is to prune.

    Args:
        model: a directory, a hub id, or a model object, which stays where it is.
        tokenizer: to go with a model object.
        may_stream: whether the caller can do with the blocks one at a time.

    Raises:
        UsageError: a model that is to be streamed and cannot be.
        MspError: no model, one that ``check_prunable`` refuses, or weights that are not finite.
    """
    device = find_device(options.device)
    if options.stream:
        if not may_stream:
            raise UsageError("only search and prune can stream a model: this needs it in memory")
        if not isinstance(model, (str, Path)):
            raise UsageError("a model that is in memory need not be streamed: stream takes a directory or a hub id")
        with progress.stage("Loading all but the blocks"):
            loaded, structure = load_stored(
                model, dtype=options.dtype, device=device, trust_remote_code=options.trust_remote_code
            )
            check_prunable(loaded)
        return Opened(loaded, structure, device, streamed=True)
    if isinstance(model, (str, Path)):
        with progress.stage("Loading the model"):
            loaded = load_model(
                model,
                dtype=options.dtype,
                device=device,
                dequantise=options.dequantise,
                narrow=True,
                trust_remote_code=options.trust_remote_code,
            )
    else:
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        loaded = LoadedModel(model.eval(), tokenizer, name, StoredDtypes.of_model(model))
        device = device_of(model)
    check_prunable(loaded)
    structure = find_structure(loaded.model)
    if structure.failure is not None:
        raise MspError(f"{loaded.source}: a forward of token ids fails: {structure.failure}")
    changed = structure.changes.again
    if changed:
        warnings.warn(
            f"{loaded.source}: every forward changes {len(changed)} of its tensors ({min(changed)}): here each starts "
            "from the values that they were loaded with",
            stacklevel=2,
        )
    if not isinstance(model, (str, Path)):  # what is loaded was checked
        check_finite(named_tensors(loaded.model))
    return Opened(loaded, structure, device)


def open_skeleton(source: str | Path, options: Options) -> Opened:
    """The model as ``open_model`` opens it, without its weights: enough to plan.

    Raises:
        UsageError: a model that has to be dequantised first.
        MspError: as ``open_model``.
    """
    if options.dequantise:
        raise UsageError("a quantised model has to be dequantised to be looked at: that goes with no dry run")
    device = find_device(options.device)
    loaded, _ = read_skeleton(source, dtype=options.dtype, device=device, trust_remote_code=options.trust_remote_code)
    check_prunable(loaded)
    return Opened(loaded, find_structure(loaded.model), device, streamed=options.stream)


def vocabulary_size(model: Any) -> int:
    """Rows of the input embeddings: no token id may reach it."""
    return int(model.get_input_embeddings().num_embeddings)


def window_of(model: Any, window: int | None) -> int:
    """Tokens per sequence: ``window``, or the model's context, at most 2048."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return min(2048, int(context)) if context else 2048
    if context and window > context:
        raise UsageError(f"a window of {window} tokens is longer than the model's context of {context}")
    return window
