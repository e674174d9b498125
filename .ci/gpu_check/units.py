"""The units of the check: each a command of its own with a limit, and the reader of its outcome."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.process import ROOT, Done, run

Result = dict[str, Any]
HERE = Path(__file__).resolve().parent
# the names of an op's kernels, if they differ from the op's name
KERNELS = {"nm_linear": ("spmm", "gemv", "skinny")}
TOOLS = ("memcheck", "racecheck")
# Estimated seconds for the rows of a benchmark's figures. Benchmarks of one long row come first: the others can use the
# time that they leave.
BENCH_SECONDS = {
    "decode": 140.0,  # two models are made and compiled before anything is measured
    "fisher_trace": 65.0,
    "obs_prune": 30.0,
    "fisher_diag": 25.0,
    "nm_select": 40.0,
    "nm_linear": 45.0,
    "nm_spmm": 95.0,
}
# with less they would not come to their row's end
LEAST = {"decode": 130.0, "fisher_trace": 50.0}
PART_NAMES = ("tests", "sanitizer", "bench")
SANITIZER_FOUND = 99
# with asynchronous copies and wgmma, whose synchronisation racecheck does not always recognise: findings may be false
ASYNCHRONOUS = ("nm_linear", "nm_linear.tiles", "nm_linear.fragments", "fisher_diag_", "fisher_trace")
# tests that need no GPU and gain nothing from one
ON_CPU = ("_cpu", "_cpu_calls", "_emulated")


@dataclass(frozen=True)
class Unit:
    """``run`` gets its limit in seconds and returns at least an ``outcome``.

    Outcomes are passed, failed, timeout, cut short (by itself, with its results so far), missing (a tool or a test) and
    to be looked at. ``weight`` is its share of the time among the units of its part; with less than ``least`` seconds
    it does not begin.
    """

    part: str
    name: str
    limit: float
    run: Callable[[float], Result]
    weight: float = 1.0
    least: float = 0.0

    def asked_for(self, words: Iterable[str]) -> bool:
        """Whether ``ONLY`` selects it: its part and its op, if parts or ops are named."""
        parts = [word for word in words if word in PART_NAMES]
        ops = [word for word in words if word not in PART_NAMES]
        aliases = [self.name, *(alias for op, known in KERNELS.items() if op in self.name for alias in known)]
        return (not parts or self.part in parts) and (
            not ops or any(word.rstrip("_") in alias for word in ops for alias in aliases)
        )


def every_op() -> list[str]:
    """The names under which ``msp/ops`` registers its ops, and ``nm_linear.tiles`` for each form of a weight.

    They are read from the source, because importing it may fail.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "msp" / "ops").rglob("[a-z]*.py"))]
    ops = [name for text in texts for name in re.findall(r'^op = Op\("(\w+)"', text, re.MULTILINE)]
    forms = [form for text in texts for form in re.findall(r'^op = \w+\.op\.form\("(\w+)"', text, re.MULTILINE)]
    return [*ops, *(f"nm_linear.{form}" for form in forms)]


def every_unit(dry: bool) -> list[Unit]:
    return [*test_units(dry), *sanitizer_units(dry), *bench_units(dry)]


def test_units(dry: bool) -> list[Unit]:
    """The device tests by op, then each file of ``tests/ops``, and all other tests marked ``gpu``."""
    folder = ROOT / "tests" / "ops"
    device = str(folder / "test_device.py")
    units = [Unit("tests", f"device {op}", 120, pytest([device, "-k", device_tests(op)]), 3.0) for op in every_op()]
    units += [
        Unit("tests", path.stem.removeprefix("test_"), 120, pytest([str(path)]))
        for path in sorted(folder.glob("test_*.py"))
        if path.stem != "test_device" and not path.stem.endswith(ON_CPU)
    ]
    if not dry:
        marked = ["tests", "-m", "gpu", f"--ignore={folder}", f"--ignore={ROOT / 'tests' / 'build'}"]
        units.append(Unit("tests", "marked gpu", 120, pytest(marked)))
    return units


def device_tests(op: str) -> str:
    """``-k`` for the tests of this op, and not of an op whose name begins with it."""
    return f"[{op}- or [{op}]"


def pytest(arguments: list[str]) -> Callable[[float], Result]:
    def run_pytest(limit: float) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={path}"]
            done = run([*command, *arguments], limit)
            report = read_report(path) if path.is_file() else read_printed(done.out)
        # 5: no test was selected
        result: Result = {"outcome": "passed" if done.code in (0, 5) else outcome_of(done), **report}
        wrong = {**report.get("failure", {}), **report.get("error", {})}
        if result["outcome"] != "passed":
            result["why"] = "; ".join(f"{name}: {why}" for name, why in wrong.items())[:2000] or done.tail()
        return result

    return run_pytest


def read_report(path: Path) -> Result:
    """A JUnit report: the number of tests by outcome, the names of the passed ones, and the reasons of the others."""
    passed, seeds, others = [], set(), {outcome: {} for outcome in ("failure", "error", "skipped")}
    for case in ElementTree.parse(path).iter("testcase"):
        name = str(case.get("name"))
        ended = next((outcome for outcome in others if case.find(outcome) is not None), None)
        if ended is None:
            passed.append(name)
        else:
            others[ended][name] = (case.find(ended).get("message") or "")[:500]
        seed = case.find("properties/property[@name='seed']")
        if seed is not None:
            seeds.add(seed.get("value"))
    counts = {"passed": len(passed), **{outcome: len(names) for outcome, names in others.items()}}
    return {"counts": counts, "seeds": sorted(seeds), "passed": passed, **others}


def read_printed(out: str) -> Result:
    """The same for a run that ended before its report, from the output of ``pytest -v`` until then."""
    printed = re.findall(r"^\S+?::(.+) (PASSED|FAILED|ERROR|SKIPPED)\b", out, re.MULTILINE)
    passed = [name for name, outcome in printed if outcome == "PASSED"]
    others = {
        key: {name: "" for name, outcome in printed if outcome == word}
        for key, word in (("failure", "FAILED"), ("error", "ERROR"), ("skipped", "SKIPPED"))
    }
    counts = {"passed": len(passed), **{key: len(names) for key, names in others.items()}}
    return {"counts": counts, "passed": passed, **others}


def sanitizer_units(dry: bool) -> list[Unit]:
    pairs = [(tool, op) for tool in TOOLS for op in every_op()]
    return [
        # several run at once, and each needs ten ports of its own to find its process
        Unit("sanitizer", f"{tool} {op}", 120, sanitizer(tool, op, dry, port=49152 + 16 * index))
        for index, (tool, op) in enumerate(pairs)
    ]


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [f"{home}/{sub}" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def sanitizer(tool: str, op: str, dry: bool, port: int) -> Callable[[float], Result]:
    def run_sanitizer(limit: float) -> Result:
        found = find_sanitizer()
        # the script stops between calls, before it is killed
        script = [sys.executable, str(HERE / "sanitized.py"), op, f"{time.time() + 0.8 * limit:.0f}"]
        if dry:
            command = script
        elif found is None:
            return {"outcome": "missing", "why": "compute-sanitizer is not installed"}
        else:
            # failing driver calls, such as torch's search for absent features, are no errors of the kernels
            options = ["--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--report-api-errors", "no"]
            options += ["--port", str(port), "--target-processes", "application-only", "--launch-timeout", "60"]
            options += ["--racecheck-detect-level", "error"] if tool == "racecheck" else []
            command = [found, *options, *script]
        # each tensor in an allocation of its own, so that a step past its end is not one into its neighbour
        done = run(command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "Device not supported" in done.out + done.errors:
            return {"outcome": "missing", "why": "compute-sanitizer says that it does not support this device"}
        outcome = outcome_of(done)
        if outcome == "passed":
            calls = [line for line in done.out.splitlines() if f"calls of {op}" in line]
            if not calls:
                return {"outcome": "failed", "why": done.tail()}
            nothing = calls[-1].startswith("0 ")
            return {"outcome": "missing", "why": calls[-1]} if nothing else {"outcome": outcome, "calls": calls[-1]}
        if done.code == SANITIZER_FOUND and tool == "racecheck" and op in ASYNCHRONOUS:
            outcome = "to be looked at"
        found_lines = [line for line in done.out.splitlines() if line.startswith("=========")]
        return {"outcome": outcome, "why": "\n".join(found_lines[:60]) or done.tail()}

    return run_sanitizer


def bench_units(dry: bool) -> list[Unit]:
    folder = ROOT / "benchmarks"
    ops = [path.stem.removeprefix("bench_") for path in sorted((folder / "gpu").glob("bench_*.py"))]
    units = [Unit("bench", op, 500, bench(op, dry), BENCH_SECONDS.get(op, 30.0), LEAST.get(op, 0.0)) for op in ops]
    order = list(BENCH_SECONDS)
    return sorted(units, key=lambda unit: order.index(unit.name) if unit.name in order else len(order))


def bench(op: str, dry: bool) -> Callable[[float], Result]:
    def run_bench(limit: float) -> Result:
        # the benchmark stops between rows; the rest of the limit is for its last row
        until = time.time() + max(0.75 * limit, limit - 10)
        times = ["--seconds", f"{limit:.0f}", "--until", f"{until:.0f}"]
        command = [sys.executable, "-m", "gpu", op, *times, *(["--dry"] if dry else [])]
        done = run(command, limit, cwd=ROOT / "benchmarks")
        return read_bench(done)

    return run_bench


def read_bench(done: Done) -> Result:
    """The rows and the rest of the JSON lines that it printed before its end, for any kind of end."""
    records = []
    for line in done.out.splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    rows = [record["row"] for record in records if "row" in record]
    result: Result = {
        "outcome": outcome_of(done),
        "rows": rows,
        "clocks": [record["clocks"] for record in records if "clocks" in record],
    }
    ends = [record for record in records if "complete" in record]
    if ends and ends[-1].get("cut_short"):
        result["outcome"] = "cut short"
    start = records[0] if records else {}
    result |= {key: start[key] for key in ("seed", "roofs", "figures", "clocks_under_load") if key in start}
    if result["outcome"] != "passed":
        wrong = [
            f"{row['name']} {row['shape']}: {row.get('failed') or 'error ' + str(row['error'])}"
            for row in rows
            if "median_us" not in row
        ]
        result["why"] = "; ".join(wrong) or (ends[-1].get("why") if ends else None) or done.tail()
    return result


def outcome_of(done: Done) -> str:
    return "timeout" if done.code is None else "passed" if done.code == 0 else "failed"
