"""Measures how long the linears of a model take to decode a token, dense and with every pattern."""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msp import __version__
from msp.base.progress import NoProgress, Progress
from msp.base.readable import dtype_name
from msp.formats.patterns import NMPattern
from msp.formats.storage import DENSE, Storage
from msp.ops import nm_select
from msp.ops._compiled import compiled_module
from msp.packed.sparse_linear import SparseLinear
from msp.plan.decode_table import DecodeTable, Shape

# More than the last cache of any machine this is likely to run on keeps between two calls of a linear.
ROTATED_BYTES = 768 << 20
# All is measured this many times over, so that a disturbance of some seconds is outvoted.
ROUNDS = 3
# How long one of these takes at least, and passes over the copies at least.
SECONDS, PASSES = 0.03, 3


def measure_decode(
    shapes: Sequence[Shape],
    patterns: Iterable[NMPattern],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> DecodeTable:
    """Time a call on one token of the linears of a model, as a packed model makes it, dense and with ``patterns``.

    As in a model, no weight is used twice before all others were: calls rotate through copies that take
    ``ROTATED_BYTES`` together or as many weights as the model has, whichever is less. On a GPU they are one CUDA
    graph.

    Args:
        shapes: ``(out, in)`` of every linear of the model.
        patterns: those whose M divides the input size of a linear are measured.
    """
    weights = sum(rows * columns for rows, columns in shapes)
    distinct = list(dict.fromkeys(patterns))
    cases = [
        (shape, storage)
        for shape in dict.fromkeys(shapes)
        for storage in (DENSE, *(Storage(p) for p in distinct if not p.is_dense and shape[1] % p.m == 0))
    ]
    samples: dict[tuple[Shape, Storage], list[float]] = {case: [] for case in cases}
    with (progress or NoProgress()).stage("Decode times", ROUNDS * len(cases)) as advance:
        for turn in range(ROUNDS):
            for index, (shape, storage) in enumerate(cases):
                linear = _linear(shape, storage, dtype).to(device)
                size = sum(tensor.nbytes for tensor in linear.state_dict().values())
                count = min(math.ceil(weights / math.prod(shape)), math.ceil(ROTATED_BYTES / size))
                samples[shape, storage].append(_seconds([copy.deepcopy(linear) for _ in range(count)], shape[1]))
                advance(turn * len(cases) + index + 1)
    times: dict[Shape, dict[str, float]] = {shape: {} for shape, _ in cases}
    for (shape, storage), found in samples.items():
        times[shape][storage.label] = statistics.median(found) * 1e6
    return DecodeTable(dtype_name(dtype), machine(device), times)


def _linear(shape: Shape, storage: Storage, dtype: torch.dtype) -> nn.Module:
    weight = torch.randn(shape).to(dtype)
    if storage.support is not None:
        return SparseLinear.from_packed(nm_select(weight, storage.support))
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return dense


@torch.inference_mode()
def _seconds(linears: Sequence[nn.Module], columns: int) -> float:
    """Of one call: the median over passes through all ``linears``."""
    like = next(linears[0].parameters())
    x = torch.randn(1, 1, columns, device=like.device).to(like.dtype)

    def calls() -> None:
        for linear in linears:
            linear(x)

    calls()
    timed = _graph_timer(calls) if like.device.type == "cuda" else _timer(calls)
    passes: list[float] = []
    while len(passes) < PASSES or sum(passes) < SECONDS:
        passes.append(timed())
    return statistics.median(passes) / len(linears)


def _timer(calls: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        calls()
        return time.perf_counter() - start

    return timed


def _graph_timer(calls: Callable[[], None]) -> Callable[[], float]:
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)

    def timed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return timed


def machine(device: torch.device) -> dict[str, Any]:
    """What times measured now depend on, as plain data."""
    versions = {"msp": __version__, "torch": str(torch.__version__)}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "versions": versions}
    compiled = compiled_module("msp._cpu")
    isa = compiled.isa() if compiled is not None else None
    return {"device": _processor(), "isa": isa, "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
