"""The options of ``prune``, ``search`` and ``compare``, and their check before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msp.allocators import SearchSettings, get_allocator
from msp.base.files import name_alone
from msp.engine.constants import read_constants
from msp.engine.distributed import Workers
from msp.errors import UsageError
from msp.evidence.task_loss import TaskLoss, fitness_name, load_task_loss
from msp.plan.budget import parse_sparsity
from msp.plan.decode_table import DecodeTable
from msp.plan.plans import PatternRules, parse_bytes, parse_time
from msp.plan.recipe import read_rules
from msp.pruners import Pruner, get_pruner
from msp.text.text_sources import DEFAULT_CALIBRATION, TokenSource
from msp.text.token_sets import check_seed

FITNESS = ("kl", "perplexity")
CANDIDATES = ("auto", "ranks", "database")


@dataclass(frozen=True)
class PruneOptions:
    """The options that ``prune``, ``search`` and ``compare`` share; see the README for the terms.

    Exactly one of ``sparsity``, ``budget_bytes``, ``budget_decode`` and ``allocation`` must be given.

    Attributes:
        sparsity: share of the linears' weights to remove, in (0, 1).
        budget_bytes: the most bytes of all tensors of the packed model: a number, or a text like ``"300MB"``.
        budget_decode: the most time that all linears together take to decode a token, each called once, like
            ``"12ms"``.
        decode_table: a file of ``msp measure`` with the times for ``budget_decode``; without it the linears are
            measured first.
        group_size: M of N:M: 4, 8, 16 or 32.
        patterns: the patterns that linears may have, like ``"1:8,2:8,4:8"``; the default is every N of ``group_size``.
        compliant: allow only the patterns that 2:4 sparse tensor cores can run.
        keep: pinned linears, like ``"layers.0.*=4:8,.*down_proj=dense"``, see ``PatternRules``.
        allocation: a file of ``search``, or a recipe, that gives every linear its pattern; it replaces the budget, the
            patterns and ``allocator``.
        allocator, pruner: registered names.
        unit: ``linear`` or ``block``: the part of the model that gets one N.
        calibration: source of calibration and fitness tokens; the default is C4 from the hub.
        evaluate: source of the test tokens; without it they are held out of ``calibration``.
        window: tokens per sequence; the default is the model's context, at most 2048.
        calibration_tokens, fitness_tokens, test_tokens: sizes of the token sets, rounded down to windows.
        fitness: the measure that a search minimises: ``kl`` (to the dense model), ``perplexity``, or your own loss, as
            a function or as ``"module:function"``; ``msp.evidence.task_loss.TaskLoss`` describes its arguments and
            result.
        fitness_noise: share of the fitness tokens, in [0, 1), that random tokens of the same set replace, for ``kl``. A
            search on clean text alone fits that kind of text (docs/search-notebook.md).
        candidates: the weights that a search measures: ``ranks`` keeps the dense weights that the pruner ranks first;
            ``database`` uses linears that were pruned to every level before the search; ``auto`` chooses the database
            for pruners that update weights.
        evaluations: the number of candidates that a search may breed, in whole generations. The first candidates and
            the measured sensitivities do not count. The default is the allocator's own number.
        search_tokens: no generation begins after the search has forwarded this many tokens. Without ``evaluations``,
            only this limit ends the search.
        search_options: constants of a search that replace the allocator's own, see ``msp.engine.constants``.
        seed: the seed of the token draw and of the search.
        dtype, device: as in ``load_model``; the device ``auto`` is a GPU if there is one.
        dequantise: convert the weights of a quantised model to floats; without it such a model is refused.
        trust_remote_code: run the Python code that comes with the model.
        workers: the number of processes that run candidates, through Ray; the default is this process alone.
        ray_address: the Ray cluster that runs the candidates, ``auto`` or ``host:port``; without ``workers`` the
            search uses the whole cluster.
        work_dir: the folder of the checkpoint and the database of a search.
        resume: continue from the checkpoint and the database in ``work_dir``.
        stream: hold one block in memory at a time, for a model that does not fit (``search`` and ``prune``,
            docs/search.md).
        hidden_bytes: memory for hidden states, a number, or a text like ``"4GB"``. With ``stream`` it is host memory
            for the states that wait for the next block; otherwise it is memory of the model's device for the states
            that candidates share. ``auto`` is 4 GB at most. On a CPU it is also at most a quarter of the free memory
            with ``stream``; without it, half of the free memory, and half of the model or 256 MiB if that is more.
    """

    sparsity: float | None
    budget_bytes: int | str | None = None
    budget_decode: str | None = None
    decode_table: str | Path | None = None
    group_size: int = 8
    patterns: str | None = None
    compliant: bool = False
    keep: str | None = None
    allocation: str | Path | None = None
    allocator: str = "msp"
    pruner: str = "wanda"
    unit: str = "linear"
    calibration: str | None = None
    evaluate: str | None = None
    window: int | None = None
    calibration_tokens: int = 65_536
    fitness_tokens: int = 32_768
    test_tokens: int = 32_768
    fitness: str | TaskLoss = "kl"
    fitness_noise: float = 0.15
    candidates: str = "auto"
    evaluations: int | None = None
    search_tokens: int | None = None
    search_options: str | Path | Mapping[str, Any] | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    dequantise: bool = False
    trust_remote_code: bool = False
    workers: int | None = None
    ray_address: str | None = None
    work_dir: Path | None = None
    resume: bool = False
    stream: bool = False
    hidden_bytes: int | str = "auto"

    def check(self) -> None:
        """Check everything that can be checked without the model.

        Raises:
            UsageError: an option is wrong, or options exclude each other.
            MspError: a text source cannot be read.
        """
        ways = (self.sparsity, self.budget_bytes, self.budget_decode, self.allocation)
        if sum(given is not None for given in ways) != 1:
            raise UsageError(
                "how much may stay: a sparsity, budget_bytes, budget_decode or an allocation says it, one of them"
            )
        if self.allocation is not None and (self.patterns or self.keep or self.compliant):
            raise UsageError("an allocation says every pattern: patterns, keep and compliant do not go with it")
        if self.sparsity is not None:
            parse_sparsity(self.sparsity)
        if self.budget_bytes is not None:
            parse_bytes(self.budget_bytes)
        if self.budget_decode is not None:
            parse_time(self.budget_decode)
        if self.decode_table is not None:
            if self.budget_decode is None:
                raise UsageError("a decode table goes with budget_decode, the time that it is to meet")
            DecodeTable.load(self.decode_table)
        get_allocator(self.allocator)
        pruner = get_pruner(self.pruner)
        if self.candidates not in CANDIDATES:
            raise UsageError(f"candidates {self.candidates!r} is not one of {', '.join(CANDIDATES)}")
        if self.hidden_bytes != "auto":
            parse_bytes(self.hidden_bytes)
        if self.stream:
            self._check_stream(pruner)
        _ = self.rules, self.measure, self.search
        check_seed(self.seed)
        if not 0 <= self.fitness_noise < 1:
            raise UsageError(f"fitness noise {self.fitness_noise:g} is outside [0, 1)")
        if self.evaluations is not None and self.evaluations < 1:
            raise UsageError(f"{self.evaluations} evaluations: a search needs at least one")
        if self.search_tokens is not None and self.search_tokens < 1:
            raise UsageError(f"{self.search_tokens} search tokens: a search needs at least one")
        if self.resume and self.work_dir is None:
            raise UsageError("resume needs work_dir, the folder with the checkpoint of the search")
        for source in (self.calibration or DEFAULT_CALIBRATION, self.evaluate):
            if source is not None:
                TokenSource.parse(source).check()

    def _check_stream(self, pruner: Pruner) -> None:
        if self.dequantise:
            raise UsageError("a quantised model is dequantised as a whole: dequantise does not go with stream")
        if "fisher" in pruner.needs or self.allocator == "fisher-knapsack":
            raise UsageError("fisher and fisher-knapsack keep a float32 per weight: they do not go with stream")
        if self.workers is not None or self.ray_address is not None:
            raise UsageError("each of the workers holds the whole model: they do not go with stream")
        if self.allocation is None and self.database(pruner):
            raise UsageError(
                f"stream makes no level database, which candidates of {self.pruner} come from here: "
                "ask for candidates ranks"
            )

    @property
    def rules(self) -> PatternRules:
        if self.allocation is not None:
            return read_rules(self.allocation)
        return PatternRules.parse(self.group_size, self.patterns, self.keep, compliant=self.compliant)

    @property
    def measure(self) -> str | TaskLoss:
        """``fitness`` as ``"kl"``, ``"perplexity"`` or a callable."""
        if not isinstance(self.fitness, str) or self.fitness in FITNESS:
            return self.fitness
        if ":" not in self.fitness:
            raise UsageError(f"fitness {self.fitness!r} is neither one of {', '.join(FITNESS)} nor module:function")
        return load_task_loss(self.fitness)

    @property
    def fitness_name(self) -> str:
        return fitness_name(self.measure)

    def database(self, pruner: Pruner) -> bool:
        """Whether a search with ``pruner`` takes its candidates from a database."""
        return self.candidates == "database" or (self.candidates == "auto" and pruner.updates_weights)

    @property
    def search(self) -> SearchSettings:
        checkpoint = self.work_dir / "search.json" if self.work_dir is not None else None
        asked = self.workers is not None or self.ray_address is not None
        workers = Workers(self.workers, self.ray_address) if asked else None
        constants = read_constants(self.search_options)
        return SearchSettings(self.evaluations, self.search_tokens, checkpoint, self.resume, workers, constants)

    @property
    def budget(self) -> dict[str, Any]:
        """The options that decide the levels, as plain data, without those that were not given."""
        if self.allocation is not None:
            return {"allocation": name_alone(self.allocation)}
        asked: dict[str, Any] = {"sparsity": None if self.sparsity is None else float(parse_sparsity(self.sparsity))}
        asked["budget_bytes"] = None if self.budget_bytes is None else parse_bytes(self.budget_bytes)
        asked["budget_decode"] = self.budget_decode
        asked["decode_table"] = None if self.decode_table is None else name_alone(self.decode_table)
        asked |= {"group_size": self.group_size} if self.patterns is None else {"patterns": self.patterns}
        asked |= {"compliant": self.compliant or None, "keep": self.keep}
        return {name: value for name, value in asked.items() if value is not None}
