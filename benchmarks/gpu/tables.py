"""Fills the GPU figures of docs/results.md from the newest results of ``make gpu-check``.

``python -m gpu.tables [gpu-check.json ...]`` in ``benchmarks/`` takes for each benchmark the newest of these results
(or of all committed ones) that has rows of it. A figure without a measured row stays "not measured", and a figure with
missing rows has no value.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from gpu.figures import FIGURES, Entry, Figure

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
START, END = "<!-- table:gpu -->", "<!-- /table:gpu -->"
NOT_MEASURED = "not measured"


def newest_benchmarks(paths: Iterable[Path]) -> dict[str, Entry]:
    """op -> its benchmark in the newest result that has rows of it, with the run in ``of``.

    A dry run does not count.
    """
    found: dict[str, Entry] = {}
    read = [{**json.loads(path.read_text(encoding="utf-8")), "file": path.name} for path in paths]
    for result in sorted(read, key=lambda result: result["date"]):
        if not result["dry"]:
            units = [unit for unit in result["units"] if unit["part"] == "bench" and unit.get("rows")]
            found |= {unit["name"]: {**unit, "of": result} for unit in units}
    return found


def committed() -> list[Path]:
    return list((ROOT / "benchmarks" / "results").glob("gpu-check-*.json"))


def measured(key: str, figure: Figure, benchmark: Entry | None) -> str:
    """The cell of one figure, and whether it has all its rows; with the reason if a benchmark ran and has no value."""
    rows = [row for row in benchmark["rows"] if key in row.get("figures", [])] if benchmark else []
    if not benchmark or not rows:
        return NOT_MEASURED
    wrong = [row for row in rows if "median_us" not in row and "failed" not in row]
    if wrong:
        return f"{NOT_MEASURED}: the error of {len(wrong)} of {len(rows)} rows is out of bound"
    fine, needed = [row for row in rows if "median_us" in row], benchmark["figures"][key]
    if len(fine) < needed:
        why = next((row["failed"] for row in rows if "failed" in row), benchmark["outcome"])
        return f"incomplete: {len(fine)} of {needed} rows: {why}"
    try:
        value = figure.value(fine, benchmark.get("roofs", {}))
    except KeyError as missing:
        why = next((row["missing"][missing.args[0]] for row in rows if missing.args[0] in row.get("missing", {})), None)
        return f"{NOT_MEASURED}: {missing.args[0]}{': ' + why if why else ' is not in the result'}"
    mark = "**" if figure.reached(value) else ""
    return f"{mark}{value:.3g} {figure.unit}{mark} ({needed} row{'s' if needed > 1 else ''})"


def sources(benchmarks: dict[str, Entry]) -> str:
    """The device and run of each benchmark, a line for each result."""
    files: dict[str, list[str]] = {}
    for name, benchmark in sorted(benchmarks.items()):
        files.setdefault(benchmark["of"]["file"], []).append(name)
    told = ""
    for file, names in files.items():
        run = benchmarks[names[0]]["of"]
        device = run["machine"]["device"]
        where = f"{device['name']}, driver {device['driver']}, commit {run['commit'][:9]}"
        told += f"- {', '.join(f'`{name}`' for name in names)}: {where}, `{file}`\n"
    return told or "No run on a GPU is recorded yet.\n"


def table(benchmarks: dict[str, Entry]) -> str:
    """The table in Markdown; values that reach their figure are bold."""
    lines = ["| what | against | wanted | measured | by |", "|---|---|---|---|---|"]
    for key, figure in FIGURES.items():
        wanted = f"at {'most' if figure.at_most else 'least'} {figure.wanted:g} {figure.unit}"
        command = f'`make gpu-check ONLY="bench {figure.op}"`'
        found = measured(key, figure, benchmarks.get(figure.op))
        lines.append(f"| {figure.what} | {figure.against} | {wanted} | {found} | {command} |")
    return sources(benchmarks) + "\n" + "\n".join(lines) + "\n"


def fill(page: str, benchmarks: dict[str, Entry]) -> str:
    before, rest = page.split(START, 1)
    return before + START + "\n" + table(benchmarks) + END + rest.split(END, 1)[1]


def main() -> None:
    from msp.base.files import write_text

    benchmarks = newest_benchmarks([Path(name) for name in sys.argv[1:]] or committed())
    write_text(PAGE, fill(PAGE.read_text(encoding="utf-8"), benchmarks))


if __name__ == "__main__":
    main()
