"""The results of the verbs: plain data that prints, compares and turns into JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from msp.base.readable import duration, number, size
from msp.formats.patterns import Allocation


@dataclass(kw_only=True, repr=False)
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

    def _told(self) -> list[str]:
        """What the first line of the ``repr`` says."""
        return [
            f"keeps {self.density:.2%} of {len(self.allocation)} linears",
            f"{size(self.bytes['dense'])} -> {size(self.bytes['packed'])}",
            f"{self.spent:,} of {self.budget:,} {self.objective}",
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'; '.join(self._told())}; {duration(sum(self.seconds.values()))})"


@dataclass(kw_only=True, repr=False)
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

    def _told(self) -> list[str]:
        perplexities = f"perplexity {number(self.perplexity['dense'])} -> {number(self.perplexity['pruned'])}"
        return [*super()._told(), perplexities, f"KL {number(self.kl)}"]


@dataclass(kw_only=True, repr=False)
class RecoverResult:
    """A packed model that was trained under its mask.

    Attributes:
        method: the name of the recovery method.
        tokens: the tokens that a phase of the method trained on, all epochs counted.
        parameters: the number of values that were trained.
        kept: whether the trained values are better than those of the start. If not, the model is as it was.
        held_out_loss: the loss on held-out tokens ``before`` and ``after``, in nats a token.
        perplexity: of the ``dense`` model and of the packed model ``before`` and ``after``, on the test tokens.
        kl: the divergence from the dense model ``before`` and ``after`` on the test tokens, in nats a token.
        bytes: all weights of the packed model as stored; the recovery does not change them.
        seconds: per stage. ``peak_memory``: of the process, in bytes of host memory.
        phases: for each phase its ``name``, its held-out loss ``before`` and ``after``, the ``step`` that was kept of
            ``steps``, the ``history`` of the held-out loss and the training ``losses``.
        recipe: what is written to the packed model.
        model: the packed model; ``tokenizer`` beside it.
    """

    method: str
    tokens: int
    parameters: int
    kept: bool
    held_out_loss: dict[str, float]
    perplexity: dict[str, float]
    kl: dict[str, float]
    bytes: int
    seconds: dict[str, float]
    peak_memory: int
    phases: list[dict[str, Any]]
    recipe: dict[str, Any]
    model: Any
    tokenizer: Any

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values, without the model."""
        return {name: value for name, value in vars(self).items() if name not in ("model", "tokenizer")}

    def __repr__(self) -> str:
        told = [
            f"{self.method}, {self.tokens:,} tokens" + ("" if self.kept else ", no gain: the model is as it was"),
            f"held-out loss {number(self.held_out_loss['before'])} -> {number(self.held_out_loss['after'])}",
            f"KL {number(self.kl['before'])} -> {number(self.kl['after'])}",
            duration(sum(self.seconds.values())),
        ]
        return f"RecoverResult({'; '.join(told)})"


@dataclass(kw_only=True, repr=False)
class SearchResult(Found):
    """An allocation with nothing pruned: ``bytes`` are those that packing will give.

    ``loss`` is what the search minimised, on all fitness tokens; None if nothing was measured.
    """

    loss: float | None

    def _told(self) -> list[str]:
        loss = [] if self.loss is None else [f"loss {number(self.loss)}"]
        return [*super()._told(), *loss]


@dataclass(repr=False)
class ParetoResult:
    """Searches to several budgets on the same model and tokens, by the names of the budgets, the loosest first."""

    model: str
    fitness: str
    results: dict[str, SearchResult]

    def __repr__(self) -> str:
        points = [
            f"{name}: {size(result.bytes['packed'])}"
            + ("" if result.loss is None else f", {self.fitness} {number(result.loss)}")
            for name, result in self.results.items()
        ]
        return f"ParetoResult({'; '.join(points)})"

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


@dataclass(repr=False)
class CompareResult:
    """All rows on the same model, test tokens and budget. ``spread`` is the standard deviation over seeds."""

    rows: list[CompareRow]
    dense_perplexity: float
    settings: dict[str, Any]

    def __repr__(self) -> str:
        means = sorted((row for row in self.rows if row.seed == "mean"), key=lambda row: row.kl)
        lines = [f"{row.allocator} {row.pruner}: KL {number(row.kl)}" for row in means]
        return f"CompareResult({'; '.join(lines)})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(repr=False)
class SensitivityResult:
    """Fisher traces per linear, their sum per block, and the shape and kind of every linear."""

    traces: dict[str, float]
    blocks: list[float]
    shapes: dict[str, tuple[int, int]]
    kinds: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        most = sorted(self.traces, key=lambda name: -self.traces[name])[:3]
        told = ", ".join(f"{name} {number(self.traces[name])}" for name in most)
        return f"SensitivityResult({len(self.traces)} linears; the most sensitive: {told})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EvaluateResult:
    """The figures of a model on a text.

    Attributes:
        model, reference: as they were given; ``reference`` and ``kl``, in nats a token, are None without a reference.
        evaluate: the text source.
        window: tokens per sequence; ``tokens`` is the number of all tokens.
        dtype: the dtype that the model computed in.
    """

    model: str
    perplexity: float
    kl: float | None
    reference: str | None
    evaluate: str
    window: int
    tokens: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Without ``kl`` and ``reference`` if there was no reference."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, repr=False)
class DenseInfo:
    """What a dense model is, and which of its linears can be pruned.

    Attributes:
        bytes: the size of its tensors as stored; ``dtype`` is the dtype of most of them.
        quantised: the method of a quantised checkpoint, or None.
        context: the longest sequence, if the configuration names it.
        linears: a row for each kind and shape: ``kind``, ``shape``, ``count``, ``weights``, and the ``group_sizes`` M
            that divide its input size.
        skipped: linears that are never pruned, with the reason.
    """

    model: str
    architecture: str
    parameters: int
    bytes: int
    dtype: str
    blocks: int
    prunable_weights: int
    quantised: str | None
    context: int | None
    linears: list[dict[str, Any]]
    skipped: dict[str, str]

    @property
    def figures(self) -> dict[str, Any]:
        """The single figures."""
        found = {name: value for name, value in vars(self).items() if name not in ("linears", "skipped")}
        return found if self.quantised else {name: value for name, value in found.items() if name != "quantised"}

    def __repr__(self) -> str:
        return (
            f"DenseInfo({self.model}: {self.architecture}, {self.parameters:,} parameters, {size(self.bytes)}, "
            f"{self.blocks} blocks, {self.prunable_weights:,} prunable weights)"
        )

    def to_json(self) -> dict[str, Any]:
        return {"packed": False, **self.figures, "linears": self.linears, "skipped": self.skipped}


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
