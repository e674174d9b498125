"""One way to measure for every GPU benchmark: our call beside its peers, cold L2, the error in the same row.

A benchmark is a file ``benchmarks/gpu/bench_<op>.py`` with one function::

    from gpu.runner import Context, Row, relative_error

    def rows(context: Context) -> Iterator[Row]:
        for size in context.sizes([8192, 16384], small=[64]):
            weights = context.rotate(lambda: context.randn(size, size), size * size * 2)
            with context.backend("cuda"):
                yield context.row(
                    "nm_example bf16",
                    f"{size}x{size}",
                    lambda turn: nm_example(weights[turn]),
                    {"cuBLAS": lambda turn: torch.mm(weights[turn], other), "cuSPARSELt": Missing("not in this torch")},
                    error=relative_error(nm_example(weights[0]), wanted),
                    bound=1e-2,
                    moved=...,
                    flops=...,
                    figures=("example-bandwidth",),
                )

``python -m gpu [op ...]`` in ``benchmarks/`` runs them, one JSON object a line; ``make gpu-check`` does so too. With
``--dry`` small shapes run on the CPU through whatever backend serves there: it shows that a benchmark runs, not how
fast anything is.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from runner import take_turns
from torch import Tensor

from gpu.timing import EventSampler, GraphSampler, HostSampler, Sampler

HERE = Path(__file__).resolve().parent
# Inputs rotate through so many times the L2 cache, and at least through two sets.
ROTATED_CACHES = 4
# A row is sampled about so long in all, at least and at most so many times.
ROW_SECONDS = 0.15
FEWEST_SAMPLES, MOST_SAMPLES = 7, 101

T = TypeVar("T")
# Takes the number of its turn, by which it picks its inputs.
Call = Callable[[int], object]


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured here, and why."""

    why: str


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name, shape: what ran, like ``nm_select wanda 2:8 bf16``, and on what, like ``8192x8192``.
        error, bound: of ours against a better computation; above the bound (or NaN) there is no speed.
        median_us: microseconds a call.
        gbps, tflops: 1e9 bytes that must move and 1e12 operations a second.
        percent_of_roof: the time that measured copy bandwidth or dense bf16 rate would need, whichever is longer, in
            percent of the median.
        ratio: peer -> its median over ours; above 1 ours is faster.
        missing: peer -> why it was not measured.
        method: ``graph`` (replays of a CUDA graph) or ``events`` (single calls after a flush of L2).
        figures: the figures (``gpu.figures``) this row counts for.
        extra: anything else measured, by name.
    """

    name: str
    shape: str
    error: float
    bound: float
    median_us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    percent_of_roof: float | None = None
    ratio: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    figures: tuple[str, ...] = ()
    extra: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.in_bound == (self.median_us is None):
            raise ValueError(
                f"{self.name} {self.shape}: an error of {self.error:.2g} against a bound of {self.bound:.2g} "
                f"{'needs a' if self.in_bound else 'allows no'} speed"
            )

    @property
    def in_bound(self) -> bool:
        return self.error <= self.bound

    def to_json(self) -> dict[str, Any]:
        """Without what is empty; an error that is no number as a string, which JSON can hold."""
        kept = {key: value for key, value in asdict(self).items() if value not in (None, {}, ())}
        return {**kept, "error": self.error if math.isfinite(self.error) else str(self.error)}


class Rotation(Generic[T]):
    """Inputs that together are larger than the caches; ``rotation[turn]`` comes round again."""

    def __init__(self, items: Sequence[T]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, turn: int) -> T:
        return self.items[turn % len(self.items)]


@dataclass(frozen=True)
class Roofs:
    """Measured in the same run: device copy (read plus written) and a dense 8192^3 bf16 product, random data."""

    copy_gbps: float
    dense_tflops: float

    def floor_us(self, moved: int | None, flops: int | None) -> float:
        """The time below which no call gets that moves so many bytes and does so many operations."""
        return max((moved or 0) / self.copy_gbps * 1e-3, (flops or 0) / self.dense_tflops * 1e-6)


class Context:
    """What a benchmark gets: the device, inputs, a way to measure, and how long it may take."""

    def __init__(self, *, dry: bool = False, seconds: float = math.inf, seed: int | None = None) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.deadline = time.monotonic() + seconds
        self.generator = torch.Generator(self.device)
        self.seed = self.generator.seed() if seed is None else self.generator.manual_seed(seed).initial_seed()

    def sizes(self, full: Sequence[T], *, small: Sequence[T]) -> Sequence[T]:
        """What to measure, or ``small`` in a dry run."""
        return small if self.dry else full

    def backend(self, name: str) -> AbstractContextManager[None]:
        """``msp.ops.force_backend``, except in a dry run, which takes what serves."""
        from msp.ops import force_backend

        return contextlib.nullcontext() if self.dry else force_backend(name)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Fresh normal numbers, none of them zero."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device).to(dtype)
        return numbers.masked_fill_(numbers == 0, 1e-3)

    def rotate(self, make: Callable[[], T], nbytes: int) -> Rotation[T]:
        """As many results of ``make``, of which a call reads or writes ``nbytes``, as no cache can hold."""
        return Rotation([make() for _ in range(max(2, math.ceil(ROTATED_CACHES * self.l2_bytes / nbytes)))])

    @cached_property
    def l2_bytes(self) -> int:
        return 1 << 10 if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size

    @cached_property
    def roofs(self) -> Roofs:
        """Measured when first asked for."""
        size, copied = (64, 1 << 12) if self.dry else (8192, 1 << 30)
        source = self.randn(copied // 2)
        target = torch.empty_like(source)
        a, b = self.randn(size, size), self.randn(size, size)
        medians = self._medians({"copy": lambda _: target.copy_(source), "mm": lambda _: torch.mm(a, b)}, 1, False)[0]
        return Roofs(2 * source.nbytes / medians["copy"] * 1e-3, 2 * size**3 / medians["mm"] * 1e-6)

    def row(
        self,
        name: str,
        shape: str,
        ours: Call,
        peers: dict[str, Call | Missing] | None = None,
        *,
        error: float,
        bound: float,
        moved: int | None = None,
        flops: int | None = None,
        turns: int = 8,
        graph: bool = True,
        figures: tuple[str, ...] = (),
        extra: dict[str, float] | None = None,
    ) -> Row:
        """Measure ``ours`` and the peers in turn; none of it where ``error`` is not within ``bound``.

        Args:
            ours, peers: calls that take a turn's number. A peer that raises is recorded as missing, with what it said.
            moved: bytes that must move; flops: operations (dense-equivalent ones for a sparse product).
            turns: turns after which the inputs come round again, the longest ``len`` of what ``rotate`` gave.
            graph: False where a call is known to synchronise, so that no CUDA graph can be made of it.
            figures, extra: see ``Row``.
        """
        if not error <= bound:
            return Row(name, shape, error, bound, figures=figures)
        missing, calls = {}, {"ours": ours}
        for peer, call in (peers or {}).items():
            if isinstance(call, Missing):
                missing[peer] = call.why
                continue
            try:
                call(0)
                self._synchronize()
            except Exception as problem:
                missing[peer] = f"{type(problem).__name__}: {problem}".split("\n")[0]
            else:
                calls[peer] = call
        medians, method = self._medians(calls, turns, graph)
        median = medians["ours"]
        return Row(
            name,
            shape,
            error,
            bound,
            median_us=median,
            gbps=moved / median * 1e-3 if moved else None,
            tflops=flops / median * 1e-6 if flops else None,
            percent_of_roof=100 * self.roofs.floor_us(moved, flops) / median if moved or flops else None,
            ratio={peer: value / median for peer, value in medians.items() if peer != "ours"},
            missing=missing,
            method=method,
            figures=figures,
            extra=extra or {},
        )

    def samplers(self, calls: dict[str, Call], turns: int, graph: bool) -> tuple[dict[str, Sampler], str]:
        """One sampler a call, all of one kind, so that the comparison is fair: graphs where all can be captured."""
        if self.dry:
            return {name: HostSampler(call) for name, call in calls.items()}, "host"
        if graph:
            try:
                return {name: GraphSampler(call, turns) for name, call in calls.items()}, "graph"
            except RuntimeError:
                torch.cuda.synchronize()
        return {name: EventSampler(call, ROTATED_CACHES * self.l2_bytes) for name, call in calls.items()}, "events"

    def _medians(self, calls: dict[str, Call], turns: int, graph: bool) -> tuple[dict[str, float], str]:
        """Microseconds a call, and how they were measured."""
        samplers, method = self.samplers(calls, turns, graph)
        start = time.perf_counter()
        for sample in samplers.values():
            sample()
        once = time.perf_counter() - start
        samples = max(FEWEST_SAMPLES, min(MOST_SAMPLES, int(ROW_SECONDS / once)))
        times = take_turns(samplers, samples)
        return {name: statistics.median(values) for name, values in times.items()}, method

    def _synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of ``wanted``, in float64; infinite where anything is not finite."""
    difference = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return difference if math.isfinite(difference) else math.inf


def clocks() -> str | None:
    """What the driver says of clocks, temperature and power, or None without nvidia-smi."""
    query = "clocks.sm,clocks.mem,clocks_event_reasons.active,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def registry() -> dict[str, Path]:
    """op -> its benchmark's file."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def records(op: str, context: Context) -> Iterator[dict[str, Any]]:
    """What ``bench_<op>`` yields as it comes: clocks, a record for each row, clocks and whether it got to its end.

    Between rows it stops when the context's time is up. An exception ends it and is a record too.
    """
    yield {"op": op, "seed": context.seed, "clocks": None if context.dry else clocks()}
    ended: dict[str, Any] = {"complete": True}
    try:
        for row in importlib.import_module(f"gpu.bench_{op}").rows(context):
            yield {"op": op, "row": row.to_json()}
            if time.monotonic() > context.deadline:
                ended = {"complete": False, "cut_short": True, "why": "its time was up"}
                break
        ended["roofs"] = asdict(context.roofs)
    except Exception as problem:
        ended = {"complete": False, "why": f"{type(problem).__name__}: {problem}"}
    yield {"op": op, **ended, "clocks": None if context.dry else clocks()}
