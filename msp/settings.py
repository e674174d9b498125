"""What a user can ask of ``prune``, ``search`` and ``compare``, and the check of it before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msp.allocators import SearchSettings, get_allocator
from msp.data import check_seed
from msp.decode_table import DecodeTable
from msp.errors import UsageError
from msp.files import name_alone
from msp.patterns import parse_sparsity
from msp.plan import PatternRules, parse_bytes, parse_time
from msp.pruners import Pruner, get_pruner
from msp.recipe import read_rules
from msp.search.constants import read_constants
from msp.search.distributed import Workers
from msp.task_loss import TaskLoss, fitness_name, load_task_loss
from msp.text_sources import DEFAULT_CALIBRATION, TokenSource

FITNESS = ("kl", "perplexity")
CANDIDATES = ("auto", "ranks", "database")


@dataclass(frozen=True)
class PruneOptions:
    """What ``prune`` and ``compare`` share; see the README for the words.

    Attributes:
        sparsity: share of the linears' weights to remove, in (0, 1); or else
        budget_bytes: what all tensors of the packed model may take: a number, or a text like ``"300MB"``; or else
        budget_decode: what all linears may take together to decode a token, each called once, like ``"12ms"``, by
        decode_table: a file of ``msp measure``; without it the linears are measured first.
        group_size: M of N:M: 4, 8, 16 or 32.
        patterns: the patterns linears may have, like ``"1:8,2:8,4:8"``, in the place of all of one group size.
        compliant: only those of them that 2:4 sparse tensor cores can run.
        allocation: a file of ``search``, or a recipe, that gives every linear its pattern; in the place of all of the
            above and of ``allocator``.
        keep: pinned linears, like ``"layers.0.*=4:8,.*down_proj=dense"``, see ``PatternRules``.
        allocator, pruner: registered names.
        unit: ``linear`` or ``block``: what gets one N.
        calibration: source of calibration and fitness tokens; the default is C4 from the hub.
        evaluate: source of the test tokens; without it they are held out of ``calibration``.
        window: tokens per sequence; the default is the model's context, at most 2048.
        calibration_tokens, fitness_tokens, test_tokens: sizes of the token sets, rounded down to windows.
        fitness: what a search minimises: ``kl`` (to the dense model), ``perplexity``, or a loss of one's own, itself or
            as ``"module:function"``; ``msp.task_loss.TaskLoss`` says what it is given and returns.
        fitness_noise: share of the fitness tokens replaced by random ones of theirs, in [0, 1), for ``kl``: a
            search on clean text alone fits that kind of text (docs/search-notebook.md).
        candidates: what a search measures: ``ranks``, linears cut down to what the pruner ranks first; ``database``,
            linears pruned to every level beforehand; ``auto``, the database for pruners that update weights.
        evaluations: candidates a search may breed, in whole generations; its first ones and measured sensitivities do
            not count; without it the allocator's own number.
        search_tokens: no generation of a search begins once it has forwarded this many tokens; without
            ``evaluations`` it is all that ends the search.
        search_options: constants of a search in the place of the allocator's own, see ``msp.search.constants``.
        seed: of the token draw and the search.
        dtype, device: as in ``load_model``; ``auto`` takes a GPU where there is one.
        dequantise: compute the weights of a quantised model back to floats, which it is refused without.
        trust_remote_code: run the Python code that comes with the model.
        workers: processes that a search runs candidates in, through Ray; without it, in this one.
        ray_address: of a Ray cluster to run them on, ``auto`` or ``host:port``; without ``workers`` on all of it.
        work_dir: where a search keeps its checkpoint and its database; ``resume`` goes on from them.
        stream: the model does not fit in memory: hold one block at a time (``search`` and ``prune``, docs/search.md).
        hidden_bytes: memory for hidden states, a number, or a text like ``"4GB"``: with ``stream`` on the host, for
            those that wait for the next block; else on the model's device, for those that candidates share. ``auto``
            is at most 4 GB and half of what is free; on a CPU, without ``stream``, also 256 MiB or half of the model.
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
        """Look at all that can be known without the model.

        Raises:
            UsageError: options that are wrong, or do not go together.
            MspError: a text source that cannot be read.
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
        """What was asked of the levels, without what was not, as plain data."""
        if self.allocation is not None:
            return {"allocation": name_alone(self.allocation)}
        asked: dict[str, Any] = {"sparsity": None if self.sparsity is None else float(parse_sparsity(self.sparsity))}
        asked["budget_bytes"] = None if self.budget_bytes is None else parse_bytes(self.budget_bytes)
        asked["budget_decode"] = self.budget_decode
        asked["decode_table"] = None if self.decode_table is None else name_alone(self.decode_table)
        asked |= {"group_size": self.group_size} if self.patterns is None else {"patterns": self.patterns}
        asked |= {"compliant": self.compliant or None, "keep": self.keep}
        return {name: value for name, value in asked.items() if value is not None}
