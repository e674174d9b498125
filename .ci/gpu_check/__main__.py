"""All checks of the kernels that need a GPU, in one JSON file: ``make gpu-check``.

Builds the missing parts, then runs the tests of the ops on the device, the sanitizers and the benchmarks. Each has a
process of its own with a limit, so that a process that hangs or breaks the device's context does not end the others.
The file is written anew after each. The check needs no network if the packages are present, and no git history: the
commit is then taken from ``MSP_COMMIT``. Exits 1 if anything failed or was cut short, or if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_check.build import build
from gpu_check.process import ROOT, run
from gpu_check.units import PART_NAMES, Result, Unit, every_unit

FINE = ("passed", "missing", "to be looked at")
# The share of the remaining time for the benchmarks, if they need it; of the rest, the share for the tests before the
# sanitizers.
BENCH_SHARE = 0.72
TEST_SHARE = 0.6
# Tests and sanitizers may run at the same time, benchmarks never. Python and compilers take most of their time.
MANY = max(2, min(12, (os.cpu_count() or 1) * 3 // 4))
TOGETHER = {"tests": MANY, "sanitizer": MANY, "bench": 1}
LEAST_SECONDS = 8.0


class Report:
    """The result, on disk after every change."""

    def __init__(self, path: Path, known: dict[str, Any]) -> None:
        self.path, self.start = path, time.monotonic()
        self.content: dict[str, Any] = {**known, "seconds": 0.0, "failed": [], "units": []}
        self.write()

    def add(self, unit: Result) -> None:
        self.content["units"].append(unit)
        name = f"{unit['part']}: {unit['name']}"
        if unit["outcome"] not in FINE:
            self.content["failed"].append(name)
        self.write()
        lines = unit.get("why", "").splitlines()
        # the last line of a traceback is the message
        told = f" ({lines[-1 if 'Traceback' in lines[0] else 0][:120]})" if lines else ""
        print(f"{self.content['seconds']:6.1f} s  {unit['outcome']:8} {name}{told}", flush=True)

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def limit_of(units: list[Unit], left: float, together: int) -> float:
    """Seconds for the first of the units to come, some of which run at a time: its share of the remaining time.

    It may take its least time, but then no more than half of the remaining time.
    """
    unit = units[0]
    share = left * together * unit.weight / sum(other.weight for other in units)
    return min(unit.limit, left, max(share, min(unit.least, left / 2)))


def ends_of_parts(units: list[Unit], left: float) -> dict[str, float]:
    """The end of each part in seconds; the next part may use the time that one leaves."""
    kept = min(sum(unit.weight for unit in units if unit.part == "bench"), BENCH_SHARE * left)
    sanitized = any(unit.part == "sanitizer" for unit in units)
    return {"tests": (left - kept) * (TEST_SHARE if sanitized else 1), "sanitizer": left - kept, "bench": left}


def run_part(report: Report, units: list[Unit], deadline: float) -> None:
    """Run the units of one part, some at a time, until ``deadline`` on the monotonic clock."""
    together = TOGETHER[units[0].part]

    def run_unit(index: int, unit: Unit) -> Result:
        limit = limit_of(units[index:], deadline - time.monotonic(), together)
        known = {"part": unit.part, "name": unit.name}
        if limit < max(LEAST_SECONDS, unit.least):
            return {**known, "outcome": "not run", "why": "the time was up"}
        start = time.monotonic()
        try:
            result = unit.run(limit)
        except Exception as error:  # a mistake of this script should not lose the other results
            result = {"outcome": "failed", "why": f"{type(error).__name__}: {error}"}
        return {**known, **result, "seconds": round(time.monotonic() - start, 1)}

    with ThreadPoolExecutor(together) as pool:
        for done in as_completed([pool.submit(run_unit, *pair) for pair in enumerate(units)]):
            report.add(done.result())


def machine() -> dict[str, Any]:
    done = run([sys.executable, str(Path(__file__).with_name("machine.py"))], 120)
    if done.code != 0:
        return {"device": None, "error": done.tail(1) if done.code else "asking for the device took too long"}
    found: dict[str, Any] = json.loads(done.out.strip().splitlines()[-1])
    return found


def commit() -> dict[str, Any]:
    """The commit of this folder itself: a copy inside another repository does not have that repository's commit."""
    top = run(["git", "rev-parse", "--show-toplevel"], 30)
    if top.code != 0 or Path(top.out.strip()).resolve() != ROOT:
        return {"commit": os.environ.get("MSP_COMMIT") or "unknown", "changed": None}
    head = run(["git", "rev-parse", "HEAD"], 30)
    status = run(["git", "status", "--porcelain", "--untracked-files=no"], 60)
    found = head.out.strip() if head.code == 0 else os.environ.get("MSP_COMMIT") or "unknown"
    return {"commit": found, "changed": bool(status.out.strip()) if status.code == 0 else None}


def result_path(asked: Path | None, now: datetime) -> Path:
    if asked is None:
        return ROOT / "benchmarks" / "results" / f"gpu-check-{now:%Y-%m-%d-%H%M%S}.json"
    return asked / "gpu-check.json" if asked.is_dir() else asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help=f"ops (nm_select, spmm, ...) and parts ({', '.join(PART_NAMES)})")
    parser.add_argument("--out", type=Path, help="the JSON file, or a folder for it")
    parser.add_argument("--seconds", type=float, default=520, help="for all of it; default 520")
    parser.add_argument("--dry", action="store_true", help="without a GPU, to see that the check itself works")
    options = parser.parse_args()

    units = [unit for unit in every_unit(options.dry) if unit.asked_for(options.only)]
    if not units:
        parser.error(f"nothing is called {' '.join(options.only)}")
    deadline = time.monotonic() + options.seconds
    now = datetime.now(timezone.utc)
    where = machine()
    known = {"date": now.isoformat(timespec="seconds"), **commit(), "only": options.only, "dry": options.dry}
    report = Report(result_path(options.out, now), {**known, "machine": where})
    if where["device"] is None and not options.dry:
        why = f"{sys.executable} sees no CUDA device: {where.get('error', 'there is none')}"
        report.add({"part": "machine", "name": "device", "outcome": "failed", "why": why})
        return 1
    if not options.dry:
        report.add({"part": "build", "name": "compiled modules", **build(where["device"]["capability"])})
        # what was not built before could not be described either
        report.content["machine"] = machine()
    start = time.monotonic()
    for part, seconds in ends_of_parts(units, deadline - start).items():
        if chosen := [unit for unit in units if unit.part == part]:
            run_part(report, chosen, start + seconds)
    report.write()
    failed = report.content["failed"]
    print(
        f"gpu-check: {len(report.content['units']) - len(failed)} of {len(report.content['units'])} fine; {report.path}"
    )
    for unit in report.content["units"]:
        if unit["outcome"] not in ("passed", "missing"):
            print(f"  {unit['outcome']}: {unit['part']}: {unit['name']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
