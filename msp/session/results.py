"""What the pipeline returns: plain data that prints, compares and turns into JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from msp.formats.patterns import Allocation


@dataclass(kw_only=True)
class Found:
    """An allocation and how it was found.

    Attributes:
        density: kept share of all linears' weights, those that stay dense included; ``kept`` weights.
        budget: the limit of what the ``objective`` counts: ``weights`` kept in all linears, ``bytes`` of the whole
            packed model, or the ``nanoseconds`` in which all linears are predicted to decode a token; ``spent`` of it.
            The dense model takes ``dense_cost``.
        allocation: pattern per linear; ``skipped`` says why the others stay as they are.
        bytes: all weights of the model as stored, ``dense`` and ``packed``.
        seconds: per stage. ``peak_memory``: of the process, in bytes of host memory.
        history: the generations of the search; empty for allocators that do not search.
        sensitivities: Fisher trace per linear where the allocator asked for them.
        recipe: everything needed to make it again, as written to the packed model.
    """

    density: float
    kept: int
    budget: int
    objective: str
    spent: int
    dense_cost: int
    allocation: Allocation
    skipped: dict[str, str]
    bytes: dict[str, int]
    seconds: dict[str, float]
    peak_memory: int
    history: list[dict[str, Any]]
    sensitivities: dict[str, float] | None
    recipe: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values, without the model."""
        plain = {name: value for name, value in vars(self).items() if name not in ("model", "tokenizer")}
        return plain | {"allocation": self.allocation.to_strings()}


@dataclass(kw_only=True)
class PruneResult(Found):
    """A packed model and how it came about.

    Attributes:
        perplexity: of the ``dense`` and the ``pruned`` model on the test tokens; ``kl`` per token, in nats.
        model: the packed model, None where it was streamed; ``tokenizer`` beside it.
        search_fitness: on the fitness tokens, in nats a token, what the search measured of the ``candidate`` it found,
            and the same of the model once it is ``pruned`` block by block; None for allocators that do not search.
    """

    perplexity: dict[str, float]
    kl: float
    model: Any
    tokenizer: Any
    search_fitness: dict[str, float] | None = None


@dataclass(kw_only=True)
class SearchResult(Found):
    """An allocation with nothing pruned: ``bytes`` are those that packing will give.

    ``loss`` is what the search minimised, on all fitness tokens; None if nothing was measured.
    """

    loss: float | None


@dataclass
class ParetoResult:
    """Searches to several budgets on the same model and tokens, by the names of the budgets, the loosest first."""

    model: str
    fitness: str
    results: dict[str, SearchResult]

    def to_json(self) -> dict[str, Any]:
        """A point for every budget; ``loss`` is the fitness that was reached, lower is better."""
        names = ("density", "kept", "objective", "budget", "spent", "loss")
        points = [
            {
                "name": name,
                **{key: getattr(result, key) for key in names},
                "bytes": result.bytes["packed"],
                "evaluations": result.history[-1]["evaluations"] if result.history else 0,
                "tokens": result.history[-1]["tokens"] if result.history else 0,
            }
            for name, result in self.results.items()
        ]
        dense = next(iter(self.results.values()))
        return {"model": self.model, "fitness": self.fitness, "dense_bytes": dense.bytes["dense"], "points": points}


@dataclass
class CompareRow:
    """One allocator with one pruner and seed; ``seed`` is ``"mean"`` over the seeds, with their ``spread``.

    ``evaluations`` counts the candidates a search measured, ``tokens`` the tokens it forwarded for that; ``history``
    holds its generations with the best loss and the tokens forwarded by then.
    """

    allocator: str
    pruner: str
    seed: int | str
    density: float
    kl: float
    perplexity: float
    evaluations: int
    seconds: float
    spread: dict[str, float] | None = None
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class CompareResult:
    """All rows on the same model, test tokens and budget. ``spread`` is the standard deviation over seeds."""

    rows: list[CompareRow]
    dense_perplexity: float
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class SensitivityResult:
    """Fisher traces per linear, their sum per block, and the shape and kind of every linear."""

    traces: dict[str, float]
    blocks: list[float]
    shapes: dict[str, tuple[int, int]]
    kinds: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


SPENT = ("evaluations", "tokens")


def mean_rows(rows: Sequence[CompareRow]) -> list[CompareRow]:
    """A mean row for every allocator and pruner among ``rows``, with the standard deviation over seeds."""
    means = []
    for key in dict.fromkeys((row.allocator, row.pruner) for row in rows):
        mine = [row for row in rows if (row.allocator, row.pruner) == key]
        density, kl, quality, seconds = (
            statistics.fmean(getattr(row, name) for row in mine) for name in ("density", "kl", "perplexity", "seconds")
        )
        spread = {
            name: statistics.stdev(getattr(row, name) for row in mine) if len(mine) > 1 else 0.0
            for name in ("kl", "perplexity")
        }
        evaluations, tokens = (round(statistics.fmean(getattr(row, name) for row in mine)) for name in SPENT)
        means.append(CompareRow(*key, "mean", density, kl, quality, evaluations, seconds, spread, tokens))
    return means
