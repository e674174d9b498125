"""Fills the GPU figures of docs/results.md from the newest result of ``make gpu-check``.

``python -m gpu.tables [gpu-check.json]`` in ``benchmarks/``. What no row of that result measured stays "not measured".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu.figures import FIGURES, Figure

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
START, END = "<!-- table:gpu -->", "<!-- /table:gpu -->"
NOT_MEASURED = "not measured"


def newest_result() -> dict[str, Any] | None:
    """Of the result files that ran benchmarks; a dry run's are none."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu-check-*.json"), reverse=True):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not result["dry"] and any(unit["part"] == "bench" for unit in result["units"]):
            return {**result, "file": path.relative_to(ROOT).as_posix()}
    return None


def measured(key: str, figure: Figure, result: dict[str, Any] | None) -> str:
    """What the result says of one figure, and whether that is enough; why it says nothing where it tried."""
    units = [] if result is None else [unit for unit in result["units"] if unit["part"] == "bench"]
    unit = next((unit for unit in units if unit["name"] == figure.op), None)
    rows = [] if unit is None else [row for row in unit.get("rows", []) if key in row.get("figures", [])]
    if unit is None or not rows:
        return NOT_MEASURED
    if wrong := [row for row in rows if "median_us" not in row]:
        return f"{NOT_MEASURED}: the error of {len(wrong)} of {len(rows)} rows is out of bound"
    try:
        value = figure.value(rows, unit.get("roofs", {}))
    except KeyError as missing:
        why = next((row["missing"][missing.args[0]] for row in rows if missing.args[0] in row.get("missing", {})), None)
        return f"{NOT_MEASURED}: {missing.args[0]}{': ' + why if why else ' is not in the result'}"
    count = f"{len(rows)} row{'s' if len(rows) > 1 else ''}"
    cut = "" if unit["outcome"] == "passed" else f", {unit['outcome']}"
    mark = "**" if figure.reached(value) else ""
    return f"{mark}{value:.3g} {figure.unit}{mark} ({count}{cut})"


def table(result: dict[str, Any] | None) -> str:
    """Markdown; what reaches its figure is bold."""
    if result is None:
        told = "No run on a GPU is recorded yet.\n"
    else:
        device = result["machine"]["device"]
        told = f"{device['name']}, driver {device['driver']}, commit {result['commit'][:9]}, `{result['file']}`:\n"
    lines = ["| what | against | wanted | measured | by |", "|---|---|---|---|---|"]
    for key, figure in FIGURES.items():
        wanted = f"at {'most' if figure.at_most else 'least'} {figure.wanted:g} {figure.unit}"
        command = f'`make gpu-check ONLY="bench {figure.op}"`'
        lines.append(f"| {figure.what} | {figure.against} | {wanted} | {measured(key, figure, result)} | {command} |")
    return told + "\n" + "\n".join(lines) + "\n"


def fill(page: str, result: dict[str, Any] | None) -> str:
    before, rest = page.split(START, 1)
    return before + START + "\n" + table(result) + END + rest.split(END, 1)[1]


def main() -> None:
    result = newest_result()
    if sys.argv[1:]:
        result = {**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), "file": Path(sys.argv[1]).name}
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
