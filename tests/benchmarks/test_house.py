"""The walks and rooms that benchmarks/house.py counts stay within their limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_house_keeps_its_limits() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "house.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert found["upward imports"] == 0
    assert found["modules at the top level"] == 1, "msp/errors.py"
    assert 3 < found["sparsity to budget"]["calls"] <= 6, found["way of the sparsity"]
    weight = found["weight to file"]
    assert weight["modules made for a linear"] == 1
    assert 15 < weight["calls for a linear"] <= 30 and weight["rooms"] <= 12, found["way of the weight"]


def test_the_table_is_of_the_results() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "house.json").read_text(encoding="utf-8"))
    before, after = results["before"], results["after"]
    rows = {
        "modules at the top level of `msp/`": lambda found: found["modules at the top level"],
        "imports against the order of the rooms": lambda found: found["upward imports"],
        "calls from a sparsity to its budget": lambda found: found["sparsity to budget"]["calls"],
        "modules made of a pruned weight": lambda found: round(found["weight to file"]["modules made for a linear"]),
        "calls from a pruned weight to its file": lambda found: round(found["weight to file"]["calls for a linear"]),
    }
    for label, figure in rows.items():
        assert f"| {label} | {figure(before)} | {figure(after)} |" in text, label
