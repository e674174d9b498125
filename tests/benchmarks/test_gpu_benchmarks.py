"""The runner of the GPU benchmarks, with clocks of our own, and every benchmark on small shapes on the CPU."""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from gpu import runner as gpu
from gpu.figures import FIGURES
from runner import take_turns

MICROSECONDS = {"ours": [10.0, 12.0, 11.0, 90.0, 8.0], "cuBLAS": [22.0], "slow": [44.0]}


class Scripted(gpu.Context):
    """A context whose clock reads from a list and whose roofs are 1000 GB/s and 100 TFLOP/s."""

    roofs = gpu.Roofs(copy_gbps=1000.0, dense_tflops=100.0)

    def __init__(self, times=MICROSECONDS, **options):
        super().__init__(dry=True, **options)
        self.times, self.called = times, []

    def samplers(self, calls, turns, graph):
        def sampler(name):
            values = iter(self.times[name] * 1000)
            return lambda: next(values)

        self.called.append((tuple(calls), turns))
        return {name: sampler(name) for name in calls}, "graph", ""


def nothing(turn):
    return None


def test_a_row_is_medians_rates_and_ratios():
    row = Scripted().measure(
        nothing,
        {"cuBLAS": nothing, "slow": nothing},
        error=1e-3,
        bound=1e-2,
        moved=5_500_000,
        flops=220_000_000,
        extra={"memory": 0.4},
    )
    assert (row.median_us, row.method) == (11.0, "graph")
    assert row.gbps == pytest.approx(500) and row.tflops == pytest.approx(20)
    assert row.percent_of_roof == pytest.approx(50)  # bytes take 5.5 us, operations 2.2 us
    assert row.ratio == {"cuBLAS": 2.0, "slow": 4.0}
    planned = gpu.Planned("op", "8x8", lambda: row, ("some",)).to_json()
    assert json.loads(json.dumps(planned)) == {**row.to_json(), "name": "op", "shape": "8x8", "figures": ["some"]}


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_no_speed_where_the_error_is_out_of_bound(error):
    context = Scripted()
    row = context.measure(nothing, {"cuBLAS": nothing}, error=error, bound=0.1, moved=1)
    assert not row.in_bound and context.called == []
    assert set(row.to_json()) == {"error", "bound"}
    json.dumps(row.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match="allows no speed"):
        gpu.Measured(error, 0.1, median_us=1.0)
    with pytest.raises(ValueError, match="needs a speed"):
        gpu.Measured(0.05, 0.1)


def test_a_peer_that_is_missing_is_said_so():
    def broken(turn):
        raise RuntimeError("no cuSPARSELt\nlong story")

    peers = {"cuBLAS": nothing, "cuSPARSELt": broken, "other": gpu.Missing("not built")}
    row = Scripted().measure(nothing, peers, error=0, bound=0)
    assert row.ratio == {"cuBLAS": 2.0}
    assert row.missing == {"cuSPARSELt": "RuntimeError: no cuSPARSELt", "other": "not built"}
    assert row.gbps is row.tflops is row.percent_of_roof is None


def test_ours_may_not_be_missing():
    def broken(turn):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        gpu.Context(dry=True).measure(broken, error=0, bound=0)


def test_inputs_rotate_through_more_than_the_cache():
    context = gpu.Context(dry=True)
    size = context.l2_bytes // 2
    rotation = context.rotate(lambda: context.randn(10), size)
    assert len(rotation) * size > context.l2_bytes
    assert rotation[len(rotation)] is rotation[0] and rotation[1] is not rotation[0]
    assert len(context.rotate(lambda: 0, context.l2_bytes * 100)) == 2


def test_inputs_are_fresh_and_never_zero():
    first, second = (gpu.Context(dry=True).randn(4096, dtype=torch.float16) for _ in range(2))
    assert not torch.equal(first, second) and (first != 0).all()
    again = [gpu.Context(dry=True, seed=3).randn(64) for _ in range(2)]
    assert torch.equal(*again)


def test_turns_are_taken_in_turn():
    order = []

    def sampler(name):
        return lambda: order.append(name) or float(len(order))

    times = take_turns({name: sampler(name) for name in "ab"}, 2, counted=2, uncounted=1)
    assert "".join(order) == "aaabbbaaabbb"
    assert times == {"a": [2.0, 3.0, 8.0, 9.0], "b": [5.0, 6.0, 11.0, 12.0]}


def test_relative_error_sees_what_is_not_finite():
    wanted = torch.tensor([3.0, 4.0])
    assert gpu.relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert gpu.relative_error(torch.tensor([3.0, math.nan]), wanted) == math.inf


def run(monkeypatch, rows, **options):
    monkeypatch.setitem(sys.modules, "gpu.bench_some", SimpleNamespace(rows=rows))
    return list(gpu.records("some", Scripted(**options)))


def planned(context, name, *figures, error=0):
    return gpu.Planned(name, "1", lambda: context.measure(nothing, error=error, bound=0), figures)


def test_rows_of_figures_come_first(monkeypatch):
    def rows(context):
        yield planned(context, "one")
        yield planned(context, "two", "some", "other", error=1)
        yield planned(context, "three", "some")

    start, two, three, one, end = run(monkeypatch, rows)
    assert isinstance(start["seed"], int) and start["figures"] == {"some": 2, "other": 1}
    assert start["roofs"] == {"copy_gbps": 1000.0, "dense_tflops": 100.0}
    assert [record["row"]["name"] for record in (two, three, one)] == ["two", "three", "one"]
    assert one["row"]["median_us"] == 11.0 and "median_us" not in two["row"]
    assert two["row"]["figures"] == ["some", "other"] and end["complete"]


def test_a_row_that_fails_takes_no_other_along(monkeypatch):
    def broken():
        raise RuntimeError("no memory\nlong story")

    def rows(context):
        yield gpu.Planned("one", "1", broken, ("some",))
        yield planned(context, "two")

    _, one, two, end = run(monkeypatch, rows)
    assert one["row"] == {"name": "one", "shape": "1", "failed": "RuntimeError: no memory", "figures": ["some"]}
    assert two["row"]["median_us"] == 11.0 and end["complete"]


def test_a_broken_device_ends_a_benchmark(monkeypatch):
    def lost(context):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(Scripted, "synchronize", lost)
    _, one, end = run(monkeypatch, lambda context: [planned(context, "one"), planned(context, "two")])
    assert one["row"]["median_us"] == 11.0
    assert end["complete"] is False and end["why"] == "one 1: RuntimeError: CUDA error: misaligned address"


def test_a_benchmark_that_cannot_be_planned_says_why(monkeypatch):
    def rows(context):
        raise ImportError("no transformers")

    start, end = run(monkeypatch, rows)
    assert "seed" in start and end["complete"] is False and end["why"] == "ImportError: no transformers"


def test_a_benchmark_ends_when_its_time_is_up(monkeypatch):
    def slow(context, name):
        time.sleep(0.1)
        return context.measure(nothing, error=0, bound=0)

    def rows(context):
        for name in "abc":
            yield gpu.Planned(name, "1", functools.partial(slow, context, name))

    *_, end = run(monkeypatch, rows, seconds=0.15)
    assert end["cut_short"] and end["complete"] is False and "time was up after" in end["why"]
    *_, end = run(monkeypatch, lambda context: [*rows(context)][:1], seconds=0.05)
    assert end["complete"]  # its last row had begun in time


@pytest.mark.parametrize("op", gpu.registry())
def test_every_benchmark_runs_dry(op, monkeypatch):
    monkeypatch.setattr(gpu, "ROW_SECONDS", 0.0)
    _, *rows, end = gpu.records(op, gpu.Context(dry=True))
    assert end["complete"], end["why"]
    assert rows
    assert [record["row"] for record in rows if "median_us" not in record["row"]] == []


class OnGpu(gpu.Context):
    """Plans what it would measure on a GPU, and makes nothing."""

    def __init__(self):
        super().__init__(dry=True)
        self.dry = False


def test_every_figure_is_planned():
    planned = [row for op in gpu.registry() for row in importlib.import_module(f"gpu.bench_{op}").rows(OnGpu())]
    counts = Counter(figure for row in planned for figure in row.figures)
    assert set(counts) == set(FIGURES)
    assert counts["spmm-dense"] == 2 * 16 and counts["spmm-cusparselt"] == 6 * 16
    assert len({(row.name, row.shape) for row in planned}) == len(planned)
