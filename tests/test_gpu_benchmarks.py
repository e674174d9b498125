"""The runner of the GPU benchmarks, with clocks of our own, and every benchmark on small shapes on the CPU."""

from __future__ import annotations

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from gpu import runner as gpu
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
        return {name: sampler(name) for name in calls}, "graph"


def nothing(turn):
    return None


def test_a_row_is_medians_rates_and_ratios():
    row = Scripted().row(
        "op",
        "8x8",
        nothing,
        {"cuBLAS": nothing, "slow": nothing},
        error=1e-3,
        bound=1e-2,
        moved=5_500_000,
        flops=220_000_000,
        figures=("some",),
        extra={"memory": 0.4},
    )
    assert (row.median_us, row.method) == (11.0, "graph")
    assert row.gbps == pytest.approx(500) and row.tflops == pytest.approx(20)
    assert row.percent_of_roof == pytest.approx(50)  # bytes take 5.5 us, operations 2.2 us
    assert row.ratio == {"cuBLAS": 2.0, "slow": 4.0}
    assert json.loads(json.dumps(row.to_json()))["figures"] == ["some"]


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_no_speed_where_the_error_is_out_of_bound(error):
    context = Scripted()
    row = context.row("op", "8x8", nothing, {"cuBLAS": nothing}, error=error, bound=0.1, moved=1)
    assert not row.in_bound and context.called == []
    assert set(row.to_json()) == {"name", "shape", "error", "bound"}
    json.dumps(row.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match="allows no speed"):
        gpu.Row("op", "8x8", error, 0.1, median_us=1.0)
    with pytest.raises(ValueError, match="needs a speed"):
        gpu.Row("op", "8x8", 0.05, 0.1)


def test_a_peer_that_is_missing_is_said_so():
    def broken(turn):
        raise RuntimeError("no cuSPARSELt\nlong story")

    peers = {"cuBLAS": nothing, "cuSPARSELt": broken, "other": gpu.Missing("not built")}
    row = Scripted().row("op", "8x8", nothing, peers, error=0, bound=0)
    assert row.ratio == {"cuBLAS": 2.0}
    assert row.missing == {"cuSPARSELt": "RuntimeError: no cuSPARSELt", "other": "not built"}
    assert row.gbps is row.tflops is row.percent_of_roof is None


def test_ours_may_not_be_missing():
    def broken(turn):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        gpu.Context(dry=True).row("op", "8x8", broken, error=0, bound=0)


def test_inputs_rotate_through_more_than_the_cache():
    context = gpu.Context(dry=True)
    rotation = context.rotate(lambda: context.randn(10), context.l2_bytes // 2)
    assert len(rotation) == 2 * gpu.ROTATED_CACHES
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


def test_records_come_row_by_row(monkeypatch):
    def rows(context):
        yield context.row("one", "1", nothing, error=0, bound=0)
        yield context.row("two", "2", nothing, error=1, bound=0)

    start, one, two, end = run(monkeypatch, rows)
    assert isinstance(start["seed"], int)
    assert one["row"]["median_us"] == 11.0 and "median_us" not in two["row"]
    assert end["complete"] and end["roofs"] == {"copy_gbps": 1000.0, "dense_tflops": 100.0}


def test_a_failure_keeps_the_rows_before_it(monkeypatch):
    def rows(context):
        yield context.row("one", "1", nothing, error=0, bound=0)
        raise RuntimeError("CUDA error: misaligned address")

    _, one, end = run(monkeypatch, rows)
    assert one["row"]["name"] == "one"
    assert end["complete"] is False and end["why"] == "RuntimeError: CUDA error: misaligned address"


def test_a_benchmark_ends_when_its_time_is_up(monkeypatch):
    def rows(context):
        for n in range(1000):
            yield context.row(str(n), "1", nothing, error=0, bound=0)
            time.sleep(0.02)

    *_, end = run(monkeypatch, rows, seconds=0.05)
    assert end["complete"] is False and "time" in end["why"]


@pytest.mark.parametrize("op", gpu.registry())
def test_every_benchmark_runs_dry(op, monkeypatch):
    monkeypatch.setattr(gpu, "ROW_SECONDS", 0.0)
    _, *rows, end = gpu.records(op, gpu.Context(dry=True))
    assert end["complete"], end["why"]
    assert rows
    assert [record["row"] for record in rows if "median_us" not in record["row"]] == []
