"""The options of ``prune``, ``search`` and ``compare``, parsed and checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp.allocators import Allocator, SearchSettings, get_allocator
from msp.base.files import name_alone
from msp.engine.constants import read_constants
from msp.engine.distributed import Workers
from msp.errors import UsageError
from msp.evidence.task_loss import TaskLoss, fitness_name, load_task_loss
from msp.models.loading import check_dtype, find_device
from msp.plan.budget import parse_sparsity
from msp.plan.decode_table import DecodeTable
from msp.plan.plans import Goal, PatternRules, parse_bytes, parse_time
from msp.plan.recipe import read_rules
from msp.pruners import Pruner, get_pruner
from msp.session.arguments import PruneArguments
from msp.session.declarations import completed
from msp.text.text_sources import DEFAULT_CALIBRATION, TokenSource
from msp.text.token_sets import check_seed

if TYPE_CHECKING:
    from typing_extensions import Unpack

FITNESS = ("kl", "perplexity")
CANDIDATES = ("auto", "ranks", "database")


@dataclass(frozen=True)
class Options:
    """The options of a run, each one parsed; ``msp.session.arguments`` says what they mean.

    Attributes:
        goal: the budget, without the facts about the model that turn it into a limit.
        budget: the options that decide the levels, as plain data for the recipe, without those that were not given.
        rules: the patterns that linears may have.
        given: whether an allocation was given, so that nothing is searched.
        fitness: ``"kl"``, ``"perplexity"`` or a function.
        candidates: ``"ranks"``, ``"database"`` or ``"auto"``, see ``database_for``.
        search: the limits and the constants of the search, its checkpoint and its workers.
        hidden_bytes: the most bytes of hidden states; None for a share of the free memory.
    """

    goal: Goal
    budget: Mapping[str, Any]
    decode_table: DecodeTable | None
    rules: PatternRules
    given: bool
    allocator: Allocator
    pruner: Pruner
    unit: str
    fitness: str | TaskLoss
    fitness_noise: float
    candidates: str
    search: SearchSettings
    calibration: str
    evaluate: str | None
    window: int | None
    calibration_tokens: int
    fitness_tokens: int
    test_tokens: int
    seed: int
    dtype: str
    device: str
    dequantise: bool
    trust_remote_code: bool
    work_dir: Path | None
    resume: bool
    stream: bool
    hidden_bytes: int | None

    @classmethod
    def parse(cls, **arguments: Unpack[PruneArguments]) -> Options:
        """The options of a run from the arguments of a verb; everything is checked that needs no model.

        Raises:
            UsageError: an option is unknown or wrong, or options exclude each other.
            MspError: a file or a text source cannot be read.
        """
        asked = completed(arguments, PruneArguments)
        allocator, pruner = get_allocator(asked["allocator"]), get_pruner(asked["pruner"])
        work_dir = None if asked["work_dir"] is None else Path(asked["work_dir"])
        fitness = _fitness(asked["fitness"])
        hidden_bytes = asked["hidden_bytes"]
        goal, rules = _goal(asked), _rules(asked)
        _check_numbers(asked)
        find_device(asked["device"])
        check_dtype(asked["dtype"])
        if asked["resume"] and work_dir is None:
            raise UsageError("resume needs work_dir, the folder with the checkpoint of the search")
        options = cls(
            goal=goal,
            budget=_budget(asked, goal),
            decode_table=None if asked["decode_table"] is None else DecodeTable.load(asked["decode_table"]),
            rules=rules,
            given=asked["allocation"] is not None,
            allocator=allocator,
            pruner=pruner,
            fitness=fitness,
            candidates=_candidates(asked["candidates"]),
            search=_search(asked, work_dir),
            calibration=asked["calibration"] or DEFAULT_CALIBRATION,
            work_dir=work_dir,
            hidden_bytes=None if hidden_bytes == "auto" else parse_bytes(hidden_bytes),
            **{name: asked[name] for name in TAKEN_OVER},
        )
        if options.stream:
            options.check_stream()
        for source in (options.calibration, options.evaluate):
            if source is not None:
                TokenSource.parse(source).check()
        return options

    def check_stream(self) -> None:
        """Raise ``UsageError`` for an option that needs the whole model in memory."""
        if self.dequantise:
            raise UsageError("a quantised model is dequantised as a whole: dequantise does not go with stream")
        if "fisher" in self.pruner.needs or self.allocator.name == "fisher-knapsack":
            raise UsageError("fisher and fisher-knapsack keep a float32 per weight: they do not go with stream")
        if self.search.workers is not None:
            raise UsageError("each of the workers holds the whole model: they do not go with stream")
        if self.database and not self.given:
            raise UsageError(
                f"stream makes no level database, which candidates of {self.pruner.name} come from here: "
                "ask for candidates ranks"
            )

    def streamed(self) -> Options:
        """The same run with one block in memory at a time; ``UsageError`` if an option needs the whole model."""
        found = replace(self, stream=True)
        found.check_stream()
        return found

    def database_for(self, pruner: Pruner) -> bool:
        """Whether a search with ``pruner`` takes its candidates from a level database."""
        return self.candidates == "database" or (self.candidates == "auto" and pruner.updates_weights)

    @property
    def database(self) -> bool:
        """``database_for`` the pruner of these options."""
        return self.database_for(self.pruner)

    @property
    def fitness_name(self) -> str:
        return fitness_name(self.fitness)


# What needs no parsing.
TAKEN_OVER = (
    "unit",
    "fitness_noise",
    "evaluate",
    "window",
    "calibration_tokens",
    "fitness_tokens",
    "test_tokens",
    "seed",
    "dtype",
    "device",
    "dequantise",
    "trust_remote_code",
    "resume",
    "stream",
)


def _goal(asked: Mapping[str, Any]) -> Goal:
    ways = ("sparsity", "budget_bytes", "budget_decode", "allocation")
    if sum(asked[way] is not None for way in ways) != 1:
        raise UsageError(
            "how much may stay: a sparsity, budget_bytes, budget_decode or an allocation says it, one of them"
        )
    if asked["decode_table"] is not None and asked["budget_decode"] is None:
        raise UsageError("a decode table goes with budget_decode, the time that it is to meet")
    if asked["sparsity"] is not None:
        return Goal(parse_sparsity(asked["sparsity"]))
    if asked["budget_bytes"] is not None:
        return Goal(None, bytes=parse_bytes(asked["budget_bytes"]))
    if asked["budget_decode"] is not None:
        return Goal(None, nanoseconds=parse_time(asked["budget_decode"]))
    return Goal(None)


def _rules(asked: Mapping[str, Any]) -> PatternRules:
    patterns, keep, compliant = asked["patterns"], asked["keep"], asked["compliant"]
    if asked["allocation"] is None:
        return PatternRules.parse(asked["group_size"], patterns, keep, compliant=compliant)
    if patterns or keep or compliant:
        raise UsageError("an allocation says every pattern: patterns, keep and compliant do not go with it")
    return read_rules(asked["allocation"])


def _budget(asked: Mapping[str, Any], goal: Goal) -> dict[str, Any]:
    if asked["allocation"] is not None:
        return {"allocation": name_alone(asked["allocation"])}
    found = {
        "sparsity": None if goal.sparsity is None else float(goal.sparsity),
        "budget_bytes": goal.bytes,
        "budget_decode": asked["budget_decode"],
        "decode_table": None if asked["decode_table"] is None else name_alone(asked["decode_table"]),
        **({"group_size": asked["group_size"]} if asked["patterns"] is None else {"patterns": asked["patterns"]}),
        "compliant": asked["compliant"] or None,
        "keep": asked["keep"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _fitness(fitness: str | TaskLoss) -> str | TaskLoss:
    if not isinstance(fitness, str) or fitness in FITNESS:
        return fitness
    if ":" not in fitness:
        raise UsageError(f"fitness {fitness!r} is neither one of {', '.join(FITNESS)} nor module:function")
    return load_task_loss(fitness)


def _candidates(candidates: str) -> str:
    if candidates not in CANDIDATES:
        raise UsageError(f"candidates {candidates!r} is not one of {', '.join(CANDIDATES)}")
    return candidates


def _search(asked: Mapping[str, Any], work_dir: Path | None) -> SearchSettings:
    workers, address = asked["workers"], asked["ray_address"]
    return SearchSettings(
        asked["evaluations"],
        asked["search_tokens"],
        None if work_dir is None else work_dir / "search.json",
        asked["resume"],
        None if workers is None and address is None else Workers(workers, address),
        read_constants(asked["search_options"]),
    )


def _check_numbers(asked: Mapping[str, Any]) -> None:
    check_seed(asked["seed"])
    if not 0 <= asked["fitness_noise"] < 1:
        raise UsageError(f"fitness noise {asked['fitness_noise']:g} is outside [0, 1)")
    for name in ("evaluations", "search_tokens"):
        if asked[name] is not None and asked[name] < 1:
            raise UsageError(f"{asked[name]} {name.replace('_', ' ')}: a search needs at least one")
