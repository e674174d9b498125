"""The tables of docs/reliability.md from the results files: ``python -m torture.table`` writes them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"
KINDS = ("kills", "saving", "disk", "concurrency", "mutations", "kernels", "numbers")
# What a row of docs says of a part, or of all parts of a kind.
NAMES = {
    "kills": "SIGKILL at a random moment, then resumed: {}",
    "saving": "SIGKILL at every step of saving, {count} ways to save",
    "disk": "a full disk, {count} commands and writers",
    "concurrency": "at once: {}",
    "mutations": "damaged files, {count} formats and readers",
    "kernels": "the same under sanitizers: {}",
    "numbers": "bad numbers: {}",
}
EACH = ("kills", "concurrency", "numbers")
MARKS = "<!-- {} of torture -->"


def load(folder: Path = RESULTS) -> dict[str, Any]:
    return {kind: json.loads((folder / f"torture-{kind}.json").read_text()) for kind in KINDS}


def summary(found: dict[str, Any]) -> str:
    """Every kind, or every part of it: how many trials, and how many failed."""
    rows = ["| what is tried | trials | failed |", "|---|---|---|"]
    for kind, content in found.items():
        parts = content["parts"]
        if kind in EACH:
            rows += [_row(NAMES[kind].format(name), [part]) for name, part in parts.items()]
        elif kind == "kernels":
            packed = parts["packed weights"]
            files = [part for name, part in parts.items() if name != "packed weights"]
            label = NAMES[kind] if content["sanitizers"] else "without sanitizers: {}"
            rows += [_row(label.format("damaged weights in the kernels"), [packed])]
            rows += [_row(label.format("damaged files"), files)]
        else:
            rows.append(_row(NAMES[kind].format(count=len(parts)), list(parts.values())))
    return "\n".join(rows)


def _row(label: str, parts: list[dict[str, Any]]) -> str:
    done, failed = (sum(part[key] for part in parts) for key in ("done", "failed"))
    return f"| {label} | {done:,} | {failed:,} |"


def formats(found: dict[str, Any]) -> str:
    """Of every format: how many changed files, and what became of them."""
    rows = ["| file | changed files | read as they say | refused | failed |", "|---|---|---|---|---|"]
    drawn: dict[str, list[int]] = {}
    for name, part in found["mutations"]["parts"].items():
        ended = part["ended"]
        figures = [part["done"], ended.get("read", 0), ended.get("refused", 0), part["failed"]]
        if name.endswith(": any JSON"):
            drawn.setdefault("JSON of any structure, all readers", [0, 0, 0, 0])
            name = "JSON of any structure, all readers"
            drawn[name] = [a + b for a, b in zip(drawn[name], figures, strict=True)]
        else:
            drawn[name] = figures
    rows += [f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} |" for name, figures in drawn.items()]
    return "\n".join(rows)


def source(found: dict[str, Any]) -> str:
    """Where the figures are from, in one line."""
    commits = ", ".join(dict.fromkeys(content["commit"] for content in found.values()))
    seeds = ", ".join(dict.fromkeys(str(content["seed"]) for content in found.values()))
    machine = next(iter(found.values()))["machine"]
    return (
        f"Made by commit {commits} with seed {seeds} on {machine['cores']} cores of an {machine['processor']} "
        "(`benchmarks/results/torture-*.json`)."
    )


def put(page: str, found: dict[str, Any]) -> str:
    """``page`` with its tables replaced."""
    for name, text in (("source", source(found)), ("summary", summary(found)), ("formats", formats(found))):
        before, begin, rest = page.partition(MARKS.format(name))
        _, end, after = rest.partition(MARKS.format(f"end of {name}"))
        assert begin and end, f"{PAGE.name} has no marks for the {name}"
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(put(PAGE.read_text(), load()))
