"""The GPU check on a machine without one: what it runs, what it makes of outcomes, and that nothing takes it down."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import timing
from gpu_check import __main__ as check
from gpu_check import build, process, units

import msp.ops
from msp.ops import _dispatch

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("sh") or "/bin/sh"


def chosen(*words: str) -> set[tuple[str, str]]:
    return {(unit.part, unit.name) for unit in units.every_unit(dry=False) if unit.asked_for(words)}


def test_everything_is_run_unless_less_is_asked_for():
    everything = chosen()
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    on_cpu = {name for name in names if f"test_{name}".endswith(units.ON_CPU)}
    assert on_cpu < names and "nm_linear_cpu" in on_cpu
    assert {("tests", name) for name in names - on_cpu - {"device"}} <= everything
    assert set(units.every_op()) >= {name for name in msp.ops.__all__ if name in _dispatch._ops}
    for op in units.every_op():
        assert {
            ("tests", f"device {op}"),
            ("sanitizer", f"memcheck {op}"),
            ("sanitizer", f"racecheck {op}"),
        } <= everything
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / "gpu").glob("bench_*.py")}
    assert {name for part, name in everything if part == "bench"} == benchmarks
    assert chosen("tests") == {unit for unit in everything if unit[0] == "tests"}


def test_a_part_may_be_asked_for_by_op_and_kernel():
    assert ("sanitizer", "memcheck obs_prune") in chosen("obs_prune")
    assert all("obs_prune" in name for _, name in chosen("obs_prune"))
    for kernel in ("spmm", "gemv"):
        assert {("tests", "nm_linear"), ("sanitizer", "racecheck nm_linear")} <= chosen(kernel)
    assert {part for part, _ in chosen("fisher_diag_", "sanitizer")} == {"sanitizer"}
    assert chosen("nothing_of_that_name") == set()


def test_an_op_is_tested_without_those_whose_name_begins_alike():
    for op in units.every_op():
        words = units.device_tests(op).split(" or ")
        names = {other: (f"test_some[{other}-cuda-bf16-1-4]", f"test_other[{other}]") for other in units.every_op()}
        assert [other for other in names if any(word in name for word in words for name in names[other])] == [op]


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path):
    file = tmp_path / "alive"
    start = time.monotonic()
    done = process.run([SHELL, "-c", f"echo begun; (sleep 3; touch {file}) & sleep 60"], 0.5)
    assert done.code is None and done.out == "begun\n" and time.monotonic() - start < 3
    time.sleep(max(0.0, 3.5 - (time.monotonic() - start)))
    assert not file.exists()
    assert process.run(["/no/such/program"], 5).code == 127


def unit(part: str, name: str, run, limit: float = 60.0) -> units.Unit:
    return units.Unit(part, name, limit, run)


def test_nothing_takes_the_others_along(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "new" / "result.json"
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.1)
    seen = []

    def good(limit):
        seen.append(json.loads(path.read_text())["failed"] if path.exists() else None)
        return {"outcome": "passed"}

    def broken(limit):
        raise KeyError("a mistake in the check")

    def hanging(limit):
        return {"outcome": units.outcome_of(process.run([SHELL, "-c", "sleep 60"], limit))}

    planned = [
        unit("bench", "broken", broken),
        unit("bench", "hanging", hanging, limit=0.3),
        unit("bench", "missing", lambda limit: {"outcome": "missing", "why": "not installed"}),
        unit("bench", "good", good),
    ]
    report = check.Report(path, {"commit": "unknown"})
    check.run_part(report, planned, time.monotonic() + 30)
    check.run_part(report, [unit("tests", "late", good)], time.monotonic())
    written = json.loads(path.read_text())
    assert {entry["name"]: entry["outcome"] for entry in written["units"]} == {
        "broken": "failed",
        "hanging": "timeout",
        "missing": "missing",
        "good": "passed",
        "late": "not run",
    }
    assert written["failed"] == ["bench: broken", "bench: hanging", "tests: late"]
    assert seen[0][0] == "bench: broken"  # was on disk before the last one began
    assert "a mistake in the check" in capsys.readouterr().out


def test_what_is_too_little_is_not_begun(tmp_path: Path):
    long = units.Unit("bench", "long", 60, lambda limit: {"outcome": "passed"}, least=40)
    report = check.Report(tmp_path / "result.json", {})
    for seconds in (30, 50):
        check.run_part(report, [long], time.monotonic() + seconds)
    assert [entry["outcome"] for entry in report.content["units"]] == ["not run", "passed"]


def test_the_time_is_enough_for_every_figure():
    everything = units.every_unit(dry=False)
    ends = check.ends_of_parts(everything, 505.0)  # with the compiled modules built before
    assert 0 < ends["tests"] < ends["sanitizer"] < ends["bench"] == 505
    left = ends["bench"] - ends["sanitizer"]
    planned = units.bench_units(dry=False)
    for index, each in enumerate(planned):  # all of which use what they get
        limit = check.limit_of(planned[index:], left, 1)
        assert limit >= max(each.least, 0.75 * each.weight), each.name
        left -= limit
    assert left >= 0


def test_less_time_is_shared():
    planned = units.bench_units(dry=False)
    assert check.limit_of(planned, 200.0, 1) < planned[0].least  # half of it is for the others
    assert check.ends_of_parts(planned, 100.0)["bench"] == 100
    assert check.ends_of_parts(units.test_units(dry=False), 100.0)["tests"] == 100
    four = [unit("tests", str(n), lambda limit: {}) for n in range(4)]
    assert [check.limit_of(four[index:], 40.0, 2) for index in range(4)] == [20, pytest.approx(80 / 3), 40, 40]


def test_tests_are_told_one_by_one(tmp_path: Path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os, pytest\n"
        "def test_good(record_property):\n    record_property('seed', 7)\n"
        "def test_bad():\n    assert 1 == 2\n"
        "@pytest.mark.skip(reason='no such kernel')\ndef test_left_out(): pass\n"
    )
    result = units.pytest([str(file), "-c", os.devnull])(60)
    assert result["outcome"] == "failed" and result["seeds"] == ["7"]
    assert result["passed"] == ["test_good"] and result["skipped"] == {"test_left_out": "no such kernel"}
    assert "assert 1 == 2" in result["failure"]["test_bad"] and "test_bad" in result["why"]
    file.write_text("import os\ndef test_dies():\n    os.abort()\n")
    died = units.pytest([str(file), "-c", os.devnull])(60)
    assert died["outcome"] == "failed" and died["why"]


def test_tests_that_were_over_before_the_end_are_told_too(tmp_path: Path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_good(x): pass\n"
        "def test_bad():\n    assert 1 == 2\n"
        "def test_dies():\n    os.abort()\n"
    )
    result = units.pytest([str(file), "-c", os.devnull])(60)
    assert result["outcome"] == "failed" and result["passed"] == ["test_good[a b]", "test_good[c]"]
    assert result["counts"] == {"passed": 2, "failure": 1, "error": 0, "skipped": 0} and "test_bad" in result["why"]


@pytest.mark.parametrize(
    ("script", "outcome", "why"),
    [
        ("echo '3 calls of nm_keep by cuda'", "passed", ""),
        ("echo '0 calls of nm_keep by triton'", "missing", "0 calls"),
        ("echo nothing", "failed", "nothing"),
        ("echo '========= Invalid __global__ write of size 4 bytes'; exit 99", "failed", "Invalid __global__ write"),
        ("echo '========= Error: Device not supported'; exit 1", "missing", "does not support this device"),
        ("sleep 60", "timeout", ""),
    ],
)
def test_what_a_sanitizer_says(script: str, outcome: str, why: str, tmp_path: Path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!{SHELL}\necho "$@" > {tmp_path}/arguments\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = units.sanitizer("racecheck", "nm_keep", dry=False, port=50000)(1.5)
    assert result["outcome"] == outcome and why in result.get("why", "")
    arguments = (tmp_path / "arguments").read_text()
    assert "--tool racecheck" in arguments and "--port 50000" in arguments and "sanitized.py nm_keep" in arguments
    if "exit 99" in script:  # what synchronises itself in ways that racecheck cannot see
        assert units.sanitizer("racecheck", "nm_linear.fragments", False, 50000)(1.5)["outcome"] == "to be looked at"
        assert units.sanitizer("memcheck", "nm_linear.fragments", False, 50000)(1.5)["outcome"] == "failed"
        assert "racecheck-detect-level" not in (tmp_path / "arguments").read_text()


def test_a_machine_without_the_sanitizer_is_said_so(monkeypatch):
    monkeypatch.setattr(units, "find_sanitizer", lambda: None)
    result = units.sanitizer("memcheck", "nm_keep", dry=False, port=50000)(10)
    assert result == {"outcome": "missing", "why": "compute-sanitizer is not installed"}


def test_rows_that_came_before_a_crash_are_kept():
    row = {"name": "op", "shape": "8x8", "error": 0.0, "bound": 0.0, "median_us": 3.0}
    roofs = {"copy_gbps": 1.0, "dense_tflops": 2.0}
    start = {"op": "op", "seed": 5, "clocks": "1980 MHz", "roofs": roofs, "figures": {"some": 2}}
    lines = [start, {"op": "op", "row": row}]
    out = "\n".join(map(json.dumps, lines)) + '\n{"op": "op", "ro'
    result = units.read_bench(process.Done(-11, out, "Segmentation fault", 2.0))
    assert result["outcome"] == "failed" and "Segmentation fault" in result["why"]
    assert result["rows"] == [row] and result["seed"] == 5 and result["clocks"] == ["1980 MHz"]
    assert result["roofs"] == roofs and result["figures"] == {"some": 2}
    wrong = {"name": "op", "shape": "9x9", "error": 0.5, "bound": 0.1}
    broken = {"name": "op", "shape": "10x10", "failed": "RuntimeError: no"}
    end = {"op": "op", "complete": True, "clocks": None}
    out = "\n".join(map(json.dumps, [*lines, {"op": "op", "row": wrong}, {"op": "op", "row": broken}, end]))
    result = units.read_bench(process.Done(1, out, "", 2.0))
    assert result["why"] == "op 9x9: error 0.5; op 10x10: RuntimeError: no"


def test_the_commit_of_a_copy_without_history(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(check, "ROOT", tmp_path)  # which is not the top of the repository that git finds
    monkeypatch.delenv("MSP_COMMIT", raising=False)
    assert check.commit() == {"commit": "unknown", "changed": None}
    monkeypatch.setenv("MSP_COMMIT", "0123abc")
    assert check.commit()["commit"] == "0123abc"


def test_where_the_result_goes(tmp_path: Path):
    now = check.datetime(2030, 1, 2, 3, 4, 5)
    assert check.result_path(None, now) == ROOT / "benchmarks" / "results" / "gpu-check-2030-01-02-030405.json"
    assert check.result_path(tmp_path, now) == tmp_path / "gpu-check.json"
    assert check.result_path(tmp_path / "some.json", now) == tmp_path / "some.json"


def test_builds_for_the_gpu_that_is_there(monkeypatch):
    assert [build.target(capability) for capability in ("8.0", "8.6", "8.9", "9.0", "10.0")] == [
        *("80", "86", "89", "90a"),
        None,
    ]
    monkeypatch.setattr(build, "up_to_date", lambda: False)
    monkeypatch.setattr(build, "NEEDED", ("no_such_package",))
    result = build.build("9.0")
    assert result["outcome"] == "failed" and "no_such_package" in result["why"]


def test_the_whole_of_it_without_a_gpu(tmp_path: Path):
    command = [sys.executable, "-m", "gpu_check", "nm_keep", "sanitizer", "--dry", "--out", str(tmp_path)]
    done = process.run(command, 120, PYTHONPATH=str(ROOT / ".ci"))
    assert done.code == 0, done.tail()
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["failed"] == [] and result["machine"]["versions"]["torch"] == torch.__version__
    assert {"nm_linear", "nm_linear.tiles", "nm_linear.group", "nm_linear.fragments"} <= set(
        result["machine"]["kernels"]["backends"]
    )
    assert {entry["name"] for entry in result["units"]} == {"memcheck nm_keep", "racecheck nm_keep"}


@pytest.mark.parametrize(("code", "said"), [(0, "there is none"), (1, "no driver"), (None, "too long")])
def test_a_machine_without_a_device_is_a_result_too(code, said, tmp_path: Path, monkeypatch):
    described = json.dumps({"device": None})
    monkeypatch.setattr(
        check, "run", lambda *command: process.Done(code, described if code == 0 else "no driver", "", 1)
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert check.main() == 1
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["failed"] == ["machine: device"] and said in result["units"][0]["why"]


class FakeCuda:
    """Events, streams and graphs of a device on which every call takes 7 microseconds."""

    def __init__(self, monkeypatch):
        self.now, self.capturing, self.captured = 0.0, False, 0
        for name in ("Event", "CUDAGraph", "Stream", "stream", "graph", "current_stream", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch, "ones", lambda count, device: torch.empty(count).fill_(1))

    def call(self, turn):
        if self.capturing:
            self.captured += 1
        else:
            self.now += 7.0

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        return Event()

    def CUDAGraph(self):
        cuda = self

        class Graph:
            calls = 0

            def replay(self):
                cuda.now += 7.0 * self.calls

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing, self.captured = True, 0
        yield
        self.capturing, graph.calls = False, self.captured

    def Stream(self):
        return self

    def wait_stream(self, other):
        pass

    def current_stream(self):
        return self

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        pass

    def _sleep(self, cycles):
        self.now += 300.0


def test_samplers_count_the_call_alone(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    sampler = timing.GraphSampler(cuda.call, turns=8)
    assert sampler.calls == cuda.captured and sampler.calls % 8 == 0
    assert sampler.calls * 7 >= timing.GRAPH_US / 2
    assert sampler() == pytest.approx(7.0)
    assert timing.EventSampler(cuda.call, 1 << 10)() == pytest.approx(7.0)
