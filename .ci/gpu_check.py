"""Runs the tests of the ops on this machine's GPU and records what passed, where and on which commit.

The result is ``benchmarks/results/gpu-check-<date>.json``. Exits 1 when there is no GPU or a test failed.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().split("\n")[0]


def describe_machine() -> dict[str, Any]:
    import torch
    import transformers
    import triton

    from msp.ops import available_backends

    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": first_line("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        "backends": {"nm_select": available_backends("nm_select")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "commit": first_line("git", "rev-parse", "HEAD"),
        "changed": bool(first_line("git", "status", "--porcelain", "--untracked-files=no")),
    }


def run_tests(report: Path, paths: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
    return subprocess.run(command, cwd=ROOT).returncode


def read_report(report: Path) -> list[dict[str, str]]:
    """One entry a test: its name, what became of it and, unless it passed, why."""
    results = []
    for case in ElementTree.parse(report).iter("testcase"):
        entry = {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": "passed"}
        for outcome in ("failure", "error", "skipped"):
            found = case.find(outcome)
            if found is not None:
                entry |= {"outcome": outcome, "why": (found.get("message") or "")[:500]}
        results.append(entry)
    return results


def main() -> int:
    try:
        import torch
    except ImportError:
        print("gpu-check: torch is not installed", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no CUDA device on this machine, so there is nothing to check",
            file=sys.stderr,
        )
        return 1
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_tests(report, sys.argv[1:] or ["tests/ops"])
        tests = read_report(report) if report.is_file() else []
    now = datetime.now(timezone.utc)
    outcomes = [test["outcome"] for test in tests]
    counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failure", "error", "skipped")}
    result = {"date": now.isoformat(timespec="seconds"), **machine, "counts": counts, "tests": tests}
    path = ROOT / "benchmarks" / "results" / f"gpu-check-{now:%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"gpu-check: {counts['passed']} of {len(tests)} passed on {machine['device']}; {path.relative_to(ROOT)}")
    return 0 if code == 0 and counts["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
