"""Quality at a given density: every allocator on the same model, budget, tokens and pruner, three seeds.

    python benchmarks/quality.py            # measure what is missing, then rewrite the table in README.md
    python benchmarks/quality.py --table    # only rewrite the table

Needs the models and texts in ``../shared`` (or ``$MSP_SHARED``). Each setting and seed is a cell with a file
of its own under ``benchmarks/results/quality``: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
SHARED = Path(os.environ.get("MSP_SHARED", ROOT.parent / "shared"))
ALLOCATORS = ("uniform", "ramp", "owl", "fisher-rank", "fisher-rank-linear", "fisher-knapsack", "msp")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """One table. Tokens are counted, not windows; ``stories`` splits a text into its stories first."""

    title: str
    model: str
    calibration: str
    evaluate: str | None
    sparsity: float
    group_size: int
    window: int
    calibration_tokens: int
    fitness_tokens: int
    test_tokens: int
    allocators: tuple[str, ...] = ALLOCATORS


WIKI: dict[str, Any] = {
    "model": "models/wiki6m",
    "calibration": "data/wikipedia-passages.jsonl:text",
    "evaluate": "data/wikitext2-test.txt",
    "window": 256,
    "calibration_tokens": 32_768,
    "fitness_tokens": 32_768,
    "test_tokens": 51_200,
}
SETTINGS = {
    "wiki6m-75": Setting("wiki6m, 75 %, groups of 8", sparsity=0.75, group_size=8, **WIKI),
    "wiki6m-87.5": Setting("wiki6m, 87.5 %, groups of 16", sparsity=0.875, group_size=16, **WIKI),
    "stories260k-50": Setting(
        "stories260k, 50 %, groups of 4",
        "models/stories260k",
        "data/tinystories-sample.txt",
        None,
        sparsity=0.5,
        group_size=4,
        window=256,
        calibration_tokens=16_384,
        fitness_tokens=16_384,
        test_tokens=16_384,
        allocators=(*ALLOCATORS[:-1], "msp-random", "msp"),
    ),
}


def measure(name: str, seed: int) -> None:
    """Run one cell in this process and write its file."""
    import torch

    import msp
    from msp.report import to_json

    torch.set_num_threads(1)
    setting = SETTINGS[name]
    commit = _commit()  # of the code that runs, not of what is committed meanwhile
    with tempfile.TemporaryDirectory() as folder:
        result = msp.compare(
            SHARED / setting.model,
            sparsity=setting.sparsity,
            allocators=setting.allocators,
            pruners=["wanda"],
            seeds=[seed],
            group_size=setting.group_size,
            calibration=_source(setting.calibration, Path(folder)),
            evaluate=str(SHARED / setting.evaluate) if setting.evaluate else None,
            window=setting.window,
            calibration_tokens=setting.calibration_tokens,
            fitness_tokens=setting.fitness_tokens,
            test_tokens=setting.test_tokens,
            device="cpu",
        )
    versions = {"msp": msp.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {"commit": commit, "versions": versions, "setting": asdict(setting)}
    content["dense_perplexity"] = result.dense_perplexity
    content["rows"] = [row for row in result.to_json()["rows"] if row["seed"] != "mean"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    _path(name, seed).write_text(to_json(content) + "\n", encoding="utf-8")


def _source(source: str, folder: Path) -> str:
    """The stories one by one, as the model was trained: each a document, paragraphs on single lines."""
    path = SHARED / source
    if path.suffix != ".txt":
        return str(path)
    paragraphs = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    stories: list[str] = []
    for paragraph in paragraphs:
        if not stories or re.match(r"Once upon a time|Once there|Once,|One day", paragraph):
            stories.append(paragraph)
        else:
            stories[-1] += "\n" + paragraph
    target = folder / "stories.jsonl"
    target.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
    return f"{target}:text"


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _path(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-seed{seed}.json"


def table() -> str:
    """Markdown of all cells that were measured: mean and standard deviation over the seeds."""
    from msp.results import CompareRow, mean_rows

    parts = []
    for name, setting in SETTINGS.items():
        cells = [json.loads(_path(name, seed).read_text()) for seed in SEEDS if _path(name, seed).exists()]
        if not cells:
            continue
        means = mean_rows([CompareRow(**row) for cell in cells for row in cell["rows"]])
        best_kl, best_perplexity = min(m.kl for m in means), min(m.perplexity for m in means)
        dense = cells[0]["dense_perplexity"]
        parts.append(f"**{setting.title}**, Wanda, {_seeds(len(cells))} (dense perplexity {dense:.1f}):\n")
        parts.append("| allocator | density | KL | perplexity | candidates |\n|---|---|---|---|---|")
        for mean in means:
            assert mean.spread is not None
            kl, perplexity = (
                f"{value:.{digits}f}" + (f" ± {mean.spread[key]:.{digits}f}" if len(cells) > 1 else "")
                for key, value, digits in (("kl", mean.kl, 3), ("perplexity", mean.perplexity, 1))
            )
            kl = f"**{kl}**" if mean.kl == best_kl else kl
            perplexity = f"**{perplexity}**" if mean.perplexity == best_perplexity else perplexity
            parts.append(f"| {mean.allocator} | {mean.density:.2%} | {kl} | {perplexity} | {mean.evaluations:,} |")
        parts.append("")
    return "\n".join(parts)


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def write_readme() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    start, end = "<!-- table:quality -->", "<!-- /table:quality -->"
    before, rest = text.split(start, 1)
    path.write_text(before + start + "\n" + table() + end + rest.split(end, 1)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only rewrite the README's table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time, one thread each")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which tables, by name")
    parser.add_argument("--cell", nargs=2, metavar=("SETTING", "SEED"), help="measure one cell in this process")
    options = parser.parse_args()
    if options.cell:
        measure(options.cell[0], int(options.cell[1]))
        return
    if not options.table:
        cells = [(name, seed) for seed in SEEDS for name in options.settings.split(",")]
        missing = [cell for cell in cells if not _path(*cell).exists()]

        def run(cell: tuple[str, int]) -> None:
            subprocess.run([sys.executable, __file__, "--cell", cell[0], str(cell[1])], check=True)
            print(f"{cell[0]}, seed {cell[1]}: done", flush=True)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(run, missing))
    write_readme()


if __name__ == "__main__":
    main()
