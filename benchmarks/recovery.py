"""Recovery: what it gives back to wiki6m, for pruners, densities, methods and numbers of tokens.

    python benchmarks/recovery.py                     # measure the missing cells
    python benchmarks/recovery.py --only seed0        # only the missing cells whose names match a regular expression
    python benchmarks/recovery.py --list              # list the measured and the missing cells
    python benchmarks/recovery.py --table             # print the table of the measured cells

Needs the models and texts in ``../shared`` (or ``$MSP_SHARED``). A cell is a pruner, a density, a seed, and a recovery
with its number of tokens; it has a file of its own under ``benchmarks/results/recovery``. KL and perplexity are
measured on WikiText-2 test, and nothing is trained on it. An interrupted run continues at the point where it stopped:
pruned models and checkpoints are under ``build/recovery``. Each cell runs in a process of its own, on one thread, so
that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MSP_SHARED", ROOT.parent / "shared"))
RESULTS = ROOT / "benchmarks" / "results" / "recovery"
WORK = ROOT / "build" / "recovery"

MODEL, TEXT, TEST = "models/wiki6m", "data/wikipedia-passages.jsonl", "data/wikitext2-test.txt"
PRUNERS = ("sparsegpt", "wanda")
DENSITIES = (0.25, 0.5, 0.125)
SEEDS = (0, 1, 2)
# The allocation of every cell but those that compare allocations.
ALLOCATOR = "fisher-rank"
# Method and tokens. "blockwise+distil" runs one after the other, each with these tokens.
RECOVERIES = (
    ("norms", 100_000),
    ("blockwise", 100_000),
    ("blockwise", 500_000),
    ("distil", 100_000),
    ("distil", 500_000),
    ("distil", 1_000_000),
    ("distil", 3_000_000),
    ("blockwise+distil", 500_000),
)
ALLOCATIONS = ("uniform", "ramp-best", "fisher-rank", "evopress", "msp")
# The passages have some more tokens, of which some are held out. A longer training makes several passes.
PASSAGE_TOKENS = 1_400_000
SETTING = {
    "window": 256,
    "calibration_tokens": 32_768,
    "fitness_tokens": 32_768,
    "test_tokens": 51_200,
    "search_tokens": 2_000_000,
    "held_out_tokens": 16_384,
    "batch_tokens": 2048,
    "measurements": 10,
}


@dataclass(frozen=True)
class Cell:
    """A pruned model and its recovery."""

    pruner: str = "sparsegpt"
    density: float = 0.25
    method: str = "distil"
    tokens: int = 1_000_000
    seed: int = 0
    allocator: str = ALLOCATOR

    @property
    def name(self) -> str:
        """The name of the cell's file."""
        return f"{self.pruned}-{self.method}-{self.tokens}"

    @property
    def pruned(self) -> str:
        """The name of the pruned model, which several cells share."""
        return f"wiki6m-{self.pruner}-{self.density:g}-{self.allocator}-seed{self.seed}"

    @property
    def epochs(self) -> int:
        return -(-self.tokens // PASSAGE_TOKENS)

    @property
    def setting(self) -> dict[str, Any]:
        """Everything that a row depends on; a file with another setting is measured again."""
        return {**asdict(self), **SETTING, "epochs": self.epochs}


def cells() -> list[Cell]:
    """All cells, the most important first."""
    main = [
        Cell(pruner, density, method, tokens, seed)
        for seed in SEEDS
        for density in DENSITIES
        for pruner in PRUNERS
        for method, tokens in RECOVERIES
    ]
    allocations = [Cell(seed=seed, allocator=allocator) for seed in SEEDS for allocator in ALLOCATIONS]
    return list(dict.fromkeys([*main, *allocations]))


def read(cell: Cell, results: Path) -> dict[str, Any] | None:
    """The result of a cell; None if there is none with its current setting."""
    path = results / f"{cell.name}.json"
    row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return row if row and row["setting"] == cell.setting else None


def measure(cell: Cell, work: Path) -> dict[str, Any]:
    """Measure one cell in this process, on one thread."""
    import torch
    from runner import processor

    import msp

    torch.set_num_threads(1)
    pruned = work / cell.pruned
    text = {
        "calibration": f"{SHARED / TEXT}:text",
        "evaluate": str(SHARED / TEST),
        "window": SETTING["window"],
        "test_tokens": SETTING["test_tokens"],
        "seed": cell.seed,
        "device": "cpu",
    }
    if not pruned.exists():
        names = ("calibration_tokens", "fitness_tokens", "search_tokens")
        searches = cell.allocator in ("evopress", "msp", "msp-paper")
        msp.prune(
            SHARED / MODEL,
            output=pruned,
            sparsity=1 - cell.density,
            pruner=cell.pruner,
            allocator=cell.allocator,
            work_dir=work / f"{cell.pruned}.search",
            resume=True,
            **text,
            **{name: SETTING[name] for name in names if searches or name != "search_tokens"},
        )
    results, model = [], pruned
    for method in cell.method.split("+"):
        out = work / f"{cell.name}.{method}"
        results.append(
            msp.recover(
                model,
                teacher=SHARED / MODEL,
                output=out,
                force=True,
                method=method,
                tokens=cell.tokens,
                epochs=cell.epochs,
                work_dir=work / f"{cell.name}.{method}.recover",
                resume=True,
                **text,
                **{name: SETTING[name] for name in ("held_out_tokens", "batch_tokens", "measurements")},
            )
        )
        model = out
    first, last = results[0], results[-1]
    return {
        "machine": {"processor": processor(), "threads": 1, "torch": torch.__version__, "msp": msp.__version__},
        "setting": cell.setting,
        "before": {"kl": first.kl["before"], "perplexity": first.perplexity["before"]},
        "after": {"kl": last.kl["after"], "perplexity": last.perplexity["after"]},
        "held_out_loss": {"before": first.held_out_loss["before"], "after": last.held_out_loss["after"]},
        "dense_perplexity": first.perplexity["dense"],
        "bytes": last.bytes,
        "parameters": max(result.parameters for result in results),
        "tokens": sum(result.tokens for result in results),
        # of this run alone, if it went on with the files of an earlier one
        "seconds": sum(result.seconds["train"] for result in results),
        "peak_memory": last.peak_memory,
        "phases": [
            {name: phase[name] for name in ("name", "before", "after", "step", "steps", "history")}
            for result in results
            for phase in result.phases
        ],
    }


def run(wanted: Sequence[Cell], results: Path, work: Path) -> int:
    """Measure cells in order, each in a process of its own; returns the number that failed."""
    failed = 0
    for count, cell in enumerate(wanted, start=1):
        words = ["--cell", json.dumps(asdict(cell)), "--results", str(results), "--work", str(work)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, __file__, *words], env=environment)
        row = read(cell, results)
        failed += row is None
        told = f"exit code {done.returncode}" if row is None else _told(row)
        print(f"[{count}/{len(wanted)}] {cell.name}: {told}", flush=True)
    return failed


def _told(row: dict[str, Any]) -> str:
    return f"KL {row['before']['kl']:.4f} -> {row['after']['kl']:.4f}, {row['seconds']:.0f} s"


def table(results: Path) -> str:
    """A row for each pruner, density, allocation and recovery: means over the seeds that were measured."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells():
        if row := read(cell, results):
            key = cell.density, cell.pruner, cell.allocator, cell.method, cell.tokens
            found.setdefault(key, []).append(row)
    head = ("density", "pruner", "allocation", "method", "tokens", "seeds", "KL before", "KL after", "perplexity after")
    lines = ["| " + " | ".join((*head, "trained", "seconds", "MB")) + " |", "|" + " --- |" * (len(head) + 3)]
    for (density, *words, tokens), rows in sorted(found.items()):
        before, after = ([row[when]["kl"] for row in rows] for when in ("before", "after"))
        figures = (
            *(f"{statistics.fmean(values):.3f}" for values in (before, after)),
            f"{statistics.fmean(row['after']['perplexity'] for row in rows):.1f}",
            f"{rows[0]['parameters']:,}",
            f"{statistics.fmean(row['seconds'] for row in rows):.0f}",
            f"{max(row['peak_memory'] for row in rows) / 1e6:.0f}",
        )
        lines.append("| " + " | ".join((f"{density:g}", *words, f"{tokens:,}", str(len(rows)), *figures)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose names it matches somewhere")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells' files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of pruned models and checkpoints")
    parser.add_argument("--list", action="store_true", help="list the cells and measure nothing")
    parser.add_argument("--table", action="store_true", help="print the table and measure nothing")
    parser.add_argument("--cell", type=json.loads, metavar="JSON", help="measure this one cell in this process")
    options = parser.parse_args()
    if options.cell is not None:
        from runner import commit

        from msp.base.files import write_text

        cell = Cell(**options.cell)
        options.work.mkdir(parents=True, exist_ok=True)
        row = {"commit": commit(), **measure(cell, options.work)}
        write_text(options.results / f"{cell.name}.json", json.dumps(row, indent=1) + "\n")
        return
    wanted = [cell for cell in cells() if re.search(options.only, cell.name)]
    left = [cell for cell in wanted if read(cell, options.results) is None]
    if options.list:
        for cell in wanted:
            print(f"{'missing ' if cell in left else 'measured'} {cell.name}")
    elif options.table:
        print(table(options.results))
    else:
        sys.exit(1 if run(left, options.results, options.work) else 0)


if __name__ == "__main__":
    main()
