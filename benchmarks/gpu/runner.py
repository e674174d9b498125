"""The one measuring method of every GPU benchmark: msp's call and its peers, cold L2, the error in the same row.

A benchmark is a file ``benchmarks/gpu/bench_<op>.py`` with a function that yields the rows to measure. The inputs of a
row are made at its turn, since some rows will fail and for some there will be no time::

    from gpu.runner import Context, Measured, Planned, relative_error

    def measured(context: Context, size: int) -> Measured:
        weights = context.rotate(lambda: context.randn(size, size), size * size * 2)
        with context.backend("cuda"):
            return context.measure(
                lambda turn: nm_example(weights[turn]),
                {"cuBLAS": lambda turn: torch.mm(weights[turn], other), "cuSPARSELt": Missing("not in this torch")},
                error=relative_error(nm_example(weights[0]), wanted),
                bound=1e-2,
                moved=...,
                flops=...,
            )

    def rows(context: Context) -> Iterator[Planned]:
        for size in context.sizes([8192, 16384], small=[64]):
            measure = functools.partial(measured, context, size)
            yield Planned("nm_example bf16", f"{size}x{size}", measure, ("example-bandwidth",))

``python -m gpu [op ...]`` in ``benchmarks/`` runs them, one JSON object a line; ``make gpu-check`` does so too. With
``--dry`` small shapes run on the CPU through any backend that serves there: it shows that a benchmark runs, but no
speed.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import subprocess
import time
from collections import Counter
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
# Inputs rotate through this many times the L2 cache, and at least through two sets.
ROTATED_CACHES = 4
# A row is sampled for about this long in all, and at least and at most this many times.
ROW_SECONDS = 0.15
FEWEST_SAMPLES, MOST_SAMPLES = 7, 101
# Fewer samples are enough if one of each takes this long.
SLOW_SECONDS, FEWEST_SLOW_SAMPLES = 0.3, 3

T = TypeVar("T")
# Takes the number of its turn, which selects its inputs.
Call = Callable[[int], object]


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured here, and the reason."""

    why: str


@dataclass(frozen=True)
class Measured:
    """The result for one line of a table.

    Attributes:
        error, bound: the error of msp's result against a better computation; above the bound (or NaN) there is no
            speed.
        median_us: microseconds a call.
        gbps, tflops: 1e9 bytes that must move and 1e12 operations a second.
        percent_of_roof: the time at the measured copy bandwidth or dense bf16 rate, whichever is longer, in percent of
            the median.
        ratio: peer -> its median over msp's; above 1 msp is faster.
        missing: peer -> why it was not measured, and ``CUDA graph`` -> why there is none.
        method: ``graph`` (replays of a CUDA graph) or ``events`` (single calls after a flush of L2).
        extra: other measurements, by name.
    """

    error: float
    bound: float
    median_us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    percent_of_roof: float | None = None
    ratio: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    extra: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.in_bound == (self.median_us is None):
            raise ValueError(
                f"an error of {self.error:.2g} against a bound of {self.bound:.2g} "
                f"{'needs a' if self.in_bound else 'allows no'} speed"
            )

    @property
    def in_bound(self) -> bool:
        return self.error <= self.bound

    def to_json(self) -> dict[str, Any]:
        """The row without empty entries; an error that is no number becomes a string, which JSON can hold."""
        kept = {key: value for key, value in asdict(self).items() if value not in (None, {})}
        return {**kept, "error": self.error if math.isfinite(self.error) else str(self.error)}


@dataclass(frozen=True)
class Planned:
    """A row before it is measured.

    Attributes:
        name, shape: the kernel and its variant, like ``nm_select wanda 2:8 bf16``, and the shape, like ``8192x8192``.
        figures: the figures (``gpu.figures``) to which it belongs; rows that belong to some are measured first.
    """

    name: str
    shape: str
    measure: Callable[[], Measured]
    figures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The row, measured now; if it fails, ``failed`` has the reason."""
        try:
            found = self.measure().to_json()
        except Exception as problem:
            found = {"failed": told(problem)}
        figures = {"figures": list(self.figures)} if self.figures else {}
        return {"name": self.name, "shape": self.shape, **found, **figures}


def told(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".split("\n")[0]


class Rotation(Generic[T]):
    """Inputs that together are larger than the caches; ``rotation[turn]`` repeats them in turn."""

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
        """The least time of a call that moves this many bytes and does this many operations."""
        return max((moved or 0) / self.copy_gbps * 1e-3, (flops or 0) / self.dense_tflops * 1e-6)


class Context:
    """The arguments of a benchmark: the device, inputs, a way to measure, and the time it may take."""

    def __init__(self, *, dry: bool = False, seconds: float = math.inf, seed: int | None = None) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.deadline = time.monotonic() + seconds
        self.generator = torch.Generator(self.device)
        self.seed = self.generator.seed() if seed is None else self.generator.manual_seed(seed).initial_seed()

    def sizes(self, full: Sequence[T], *, small: Sequence[T]) -> Sequence[T]:
        """The sizes to measure, or ``small`` in a dry run."""
        return small if self.dry else full

    def backend(self, name: str) -> AbstractContextManager[None]:
        """``msp.ops.force_backend``, except in a dry run, which uses any backend that serves."""
        from msp.ops import force_backend

        return contextlib.nullcontext() if self.dry else force_backend(name)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Fresh normal numbers, none of them zero."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device).to(dtype)
        return numbers.masked_fill_(numbers == 0, 1e-3)

    def rotate(self, make: Callable[[], T], nbytes: int) -> Rotation[T]:
        """Enough results of ``make`` that no cache holds them all; a call reads or writes ``nbytes`` of each."""
        return Rotation([make() for _ in range(max(2, math.ceil(ROTATED_CACHES * self.l2_bytes / nbytes)))])

    @cached_property
    def l2_bytes(self) -> int:
        return 1 << 10 if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size

    @cached_property
    def roofs(self) -> Roofs:
        """The roofs, measured on first use."""
        size, copied = (64, 1 << 12) if self.dry else (8192, 1 << 30)
        source = self.randn(copied // 2)
        target = torch.empty_like(source)
        a, b = self.randn(size, size), self.randn(size, size)
        calls: dict[str, Call] = {"copy": lambda _: target.copy_(source), "mm": lambda _: torch.mm(a, b)}
        medians = self._medians(self._one_by_one(calls))
        return Roofs(2 * source.nbytes / medians["copy"] * 1e-3, 2 * size**3 / medians["mm"] * 1e-6)

    def clocks_under_load(self) -> str | None:
        """The clocks of a GPU that is busy with dense products at the time."""
        if self.dry:
            return None
        a = self.randn(8192, 8192)
        for _ in range(500):  # well over half a second
            torch.mm(a, a)
        found = clocks()
        self.synchronize()
        return found

    def measure(
        self,
        ours: Call,
        peers: dict[str, Call | Missing] | None = None,
        *,
        error: float,
        bound: float,
        moved: int | None = None,
        flops: int | None = None,
        turns: int = 8,
        graph: bool = True,
        extra: dict[str, float] | None = None,
    ) -> Measured:
        """Measure ``ours`` and the peers in turn; nothing is timed if ``error`` is not within ``bound``.

        Args:
            ours, peers: calls that take a turn's number. A peer that raises is recorded as missing, with its message.
            moved: bytes that must move; flops: operations (dense-equivalent ones for a sparse product).
            turns: turns after which the inputs repeat, the longest ``len`` of the results of ``rotate``.
            graph: False if a call is known to synchronise, so that no CUDA graph is possible.
            extra: see ``Measured``.
        """
        if not error <= bound:
            return Measured(error, bound)
        missing, calls = {}, {"ours": ours}
        for peer, call in (peers or {}).items():
            if isinstance(call, Missing):
                missing[peer] = call.why
                continue
            try:
                call(0)
                self.synchronize()
            except Exception as problem:
                missing[peer] = told(problem)
            else:
                calls[peer] = call
        samplers, method, no_graph = self.samplers(calls, turns, graph)
        if no_graph:
            missing["CUDA graph"] = no_graph
        medians = self._medians(samplers)
        median = medians["ours"]
        return Measured(
            error,
            bound,
            median_us=median,
            gbps=moved / median * 1e-3 if moved else None,
            tflops=flops / median * 1e-6 if flops else None,
            percent_of_roof=100 * self.roofs.floor_us(moved, flops) / median if moved or flops else None,
            ratio={peer: value / median for peer, value in medians.items() if peer != "ours"},
            missing=missing,
            method=method,
            extra=extra or {},
        )

    def samplers(self, calls: dict[str, Call], turns: int, graph: bool) -> tuple[dict[str, Sampler], str, str]:
        """One sampler a call, all of one kind, so that the comparison is fair: graphs if all calls can be captured.

        Also returns their method, and the reason if graphs were requested and are not possible.
        """
        if self.dry:
            return self._one_by_one(calls), "host", ""
        why = ""
        if graph:
            try:
                return {name: GraphSampler(call, turns) for name, call in calls.items()}, "graph", ""
            except RuntimeError as problem:
                why = told(problem)
                torch.cuda.synchronize()
        return self._one_by_one(calls), "events", why

    def _one_by_one(self, calls: dict[str, Call]) -> dict[str, Sampler]:
        if self.dry:
            return {name: HostSampler(call) for name, call in calls.items()}
        return {name: EventSampler(call, ROTATED_CACHES * self.l2_bytes) for name, call in calls.items()}

    @staticmethod
    def _medians(samplers: dict[str, Sampler]) -> dict[str, float]:
        """Microseconds a call."""
        start = time.perf_counter()
        for sample in samplers.values():
            sample()
        once = time.perf_counter() - start
        fewest = FEWEST_SAMPLES if once < SLOW_SECONDS else FEWEST_SLOW_SAMPLES
        samples = max(fewest, min(MOST_SAMPLES, int(ROW_SECONDS / once)))
        times = take_turns(samplers, samples)
        return {name: statistics.median(values) for name, values in times.items()}

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of ``wanted``, in float64; infinite if a value is not finite."""
    difference = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return difference if math.isfinite(difference) else math.inf


def clocks() -> str | None:
    """Clocks, temperature and power as the driver reports them, or None without nvidia-smi."""
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
    """Yields the results of ``bench_<op>`` as they come: the plan, a record for each row, and the end.

    The plan has clocks (idle and under load), roofs, and the number of rows of each figure. The rows of figures come
    first. No row begins after the context's time is up. A row that fails does not end the others, unless it broke the
    device's context.
    """
    start: dict[str, Any] = {"op": op, "seed": context.seed, "clocks": None if context.dry else clocks()}
    try:
        plan = sorted(importlib.import_module(f"gpu.bench_{op}").rows(context), key=lambda row: not row.figures)
        start["figures"] = Counter(figure for row in plan for figure in row.figures)
        start |= {"roofs": asdict(context.roofs), "clocks_under_load": context.clocks_under_load()}
    except Exception as problem:
        yield start
        yield {"op": op, "complete": False, "why": told(problem)}
        return
    yield start
    ended: dict[str, Any] = {"complete": True}
    for index, row in enumerate(plan):
        if time.monotonic() > context.deadline:
            ended = {"complete": False, "cut_short": True, "why": f"its time was up after {index} of {len(plan)} rows"}
            break
        yield {"op": op, "row": row.to_json()}
        try:
            context.synchronize()
        except Exception as problem:
            ended = {"complete": False, "why": f"{row.name} {row.shape}: {told(problem)}"}
            break
    yield {"op": op, **ended, "clocks": None if context.dry else clocks()}
