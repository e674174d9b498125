"""What a user can ask of ``prune``, ``search`` and ``compare``, and the check of it before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msp.allocators import SearchSettings, get_allocator
from msp.errors import UsageError
from msp.patterns import parse_sparsity
from msp.plan import PatternRules, parse_bytes
from msp.pruners import get_pruner
from msp.recipe import read_rules

FITNESS = ("kl", "perplexity")


@dataclass(frozen=True)
class PruneOptions:
    """What ``prune`` and ``compare`` share; see the README for the words.

    Attributes:
        sparsity: share of the linears' weights to remove, in (0, 1); or else
        budget_bytes: what all tensors of the packed model may take: a number, or a text like ``"300MB"``.
        group_size: M of N:M: 4, 8, 16 or 32.
        patterns: the patterns linears may have, like ``"1:8,2:8,4:8"``, in the place of all of one group size.
        allocation: a file of ``search``, or a recipe, that gives every linear its pattern; in the place of all of the
            above and of ``allocator``.
        keep: pinned linears, like ``"layers.0.*=4:8,.*down_proj=dense"``, see ``PatternRules``.
        allocator, pruner: registered names.
        unit: ``linear`` or ``block``: what gets one N.
        calibration: source of calibration and fitness tokens; the default is C4 from the hub.
        evaluate: source of the test tokens; without it they are held out of ``calibration``.
        window: tokens per sequence; the default is the model's context, at most 2048.
        calibration_tokens, fitness_tokens, test_tokens: sizes of the token sets, rounded down to windows.
        fitness: ``kl`` (to the dense model) or ``perplexity``, what a search minimises.
        fitness_noise: share of the fitness tokens replaced by random ones of theirs, in [0, 1), for ``kl``: a
            search on clean text alone fits that kind of text (docs/search.md).
        evaluations: candidates a search may measure; without it the allocator's own number, 970 for ``msp``.
        search_tokens: no generation of a search begins once it has forwarded this many tokens; without
            ``evaluations`` it is all that ends the search.
        seed: of the token draw and the search.
        dtype, device: as in ``load_model``; ``auto`` takes a GPU where there is one.
        work_dir: where a search keeps its checkpoint; ``resume`` goes on from it.
        stream: the model does not fit in memory: hold one block at a time (``search`` alone, docs/search.md).
        hidden_bytes: with ``stream``, host memory for hidden states: a number, or a text like ``"4GB"``.
    """

    sparsity: float | None
    budget_bytes: int | str | None = None
    group_size: int = 8
    patterns: str | None = None
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
    fitness: str = "kl"
    fitness_noise: float = 0.15
    evaluations: int | None = None
    search_tokens: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    work_dir: Path | None = None
    resume: bool = False
    stream: bool = False
    hidden_bytes: int | str = "4GB"

    def check(self) -> None:
        """Raise ``UsageError`` for anything wrong that can be known without the model."""
        if sum(given is not None for given in (self.sparsity, self.budget_bytes, self.allocation)) != 1:
            raise UsageError("how much may stay: a sparsity, budget_bytes or an allocation says it, one of them")
        if self.allocation is not None and (self.patterns or self.keep):
            raise UsageError("an allocation says every pattern: patterns and keep do not go with it")
        if self.sparsity is not None:
            parse_sparsity(self.sparsity)
        if self.budget_bytes is not None:
            parse_bytes(self.budget_bytes)
        _ = self.rules
        get_allocator(self.allocator)
        needs = get_pruner(self.pruner).needs
        parse_bytes(self.hidden_bytes)
        if self.stream and ("fisher" in needs or self.allocator == "fisher-knapsack"):
            raise UsageError("fisher and fisher-knapsack keep a float32 per weight: they do not go with stream")
        if self.fitness not in FITNESS:
            raise UsageError(f"fitness {self.fitness!r} is not one of {', '.join(FITNESS)}")
        if not 0 <= self.fitness_noise < 1:
            raise UsageError(f"fitness noise {self.fitness_noise:g} is outside [0, 1)")
        if self.evaluations is not None and self.evaluations < 1:
            raise UsageError(f"{self.evaluations} evaluations: a search needs at least one")
        if self.search_tokens is not None and self.search_tokens < 1:
            raise UsageError(f"{self.search_tokens} search tokens: a search needs at least one")
        if self.resume and self.work_dir is None:
            raise UsageError("resume needs work_dir, the folder with the checkpoint of the search")

    @property
    def rules(self) -> PatternRules:
        if self.allocation is not None:
            return read_rules(self.allocation)
        return PatternRules.parse(self.group_size, self.patterns, self.keep)

    @property
    def search(self) -> SearchSettings:
        checkpoint = self.work_dir / "search.json" if self.work_dir is not None else None
        return SearchSettings(self.evaluations, self.search_tokens, checkpoint, self.resume)

    @property
    def budget(self) -> dict[str, Any]:
        """What was asked of the levels, without what was not, as plain data."""
        if self.allocation is not None:
            return {"allocation": str(self.allocation)}
        asked: dict[str, Any] = {"sparsity": None if self.sparsity is None else float(parse_sparsity(self.sparsity))}
        asked["budget_bytes"] = None if self.budget_bytes is None else parse_bytes(self.budget_bytes)
        asked |= {"group_size": self.group_size} if self.patterns is None else {"patterns": self.patterns}
        return {name: value for name, value in (asked | {"keep": self.keep}).items() if value is not None}
