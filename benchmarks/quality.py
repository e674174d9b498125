"""Quality at a given density: every allocator with several pruners on the same models, budgets and tokens.

    python benchmarks/quality.py                      # measure the missing cells, then write the tables and the picture
    python benchmarks/quality.py --only wanda-0.25    # only the missing cells whose names match a regular expression
    python benchmarks/quality.py --tables ablation    # one of quality, patterns and ablation
    python benchmarks/quality.py --list               # list the measured and the missing cells
    python benchmarks/quality.py --write              # only write the tables and the picture

Needs the models and texts in ``../shared`` (or ``$MSP_SHARED``). A cell is one allocator with one pruner, density,
pattern, unit and seed (``quality_cells.py``); it has a file of its own under ``benchmarks/results/quality``. An
interrupted run continues at the point where it stopped, also inside a search: checkpoints are under ``build/quality``.
A search with a higher token limit than before continues from there too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from quality_cells import ROOT, TABLES, Cell, cells_of, measure, read
from runner import commit

RESULTS = ROOT / "benchmarks" / "results" / "quality"
WORK = ROOT / "build" / "quality"
PR_SET_PDEATHSIG = 1  # prctl(2)


def missing(cells: Sequence[Cell], results: Path, search_tokens: int | None = None) -> list[Cell]:
    """The cells, each once, that were not measured with their current setting."""
    return [cell for cell in dict.fromkeys(cells) if read(cell, results, search_tokens) is None]


def measure_to_file(cell: Cell, made_by: str, results: Path, work: Path, search_tokens: int | None) -> dict[str, Any]:
    row = {"commit": made_by, **measure(cell, work, search_tokens)}
    path = results / f"{cell.name}.json"
    from msp.base.files import write_text  # not before: the parent of the workers needs no torch

    write_text(path, json.dumps(row, indent=1) + "\n")
    return row


def die_with_parent() -> None:
    """End a worker with its parent: otherwise it and a worker of the next run would use the same checkpoint."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(cells: Sequence[Cell], jobs: int, results: Path, work: Path, search_tokens: int | None = None) -> int:
    """Measure cells in order, ``jobs`` at a time, in processes of one thread; returns the number that failed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    results.mkdir(parents=True, exist_ok=True)
    # workers run a copy of the current code, so later commits do not change it
    made_by, failed = commit(), 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), die_with_parent) as pool:
        rows = {pool.submit(measure_to_file, cell, made_by, results, work, search_tokens): cell for cell in cells}
        try:
            for count, done in enumerate(as_completed(rows), start=1):
                told = f"[{count}/{len(cells)}] {rows[done].name}:"
                if error := done.exception():
                    failed += 1
                    print(told, f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                else:
                    row = done.result()
                    print(told, f"KL {row['kl']:.4f}, perplexity {row['perplexity']:.1f}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose names it matches somewhere")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time, one thread each")
    parser.add_argument("--search-tokens", type=int, help="a trial: in the place of each model's own number")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells' files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the searches' checkpoints")
    parser.add_argument("--list", action="store_true", help="list the cells and measure nothing")
    parser.add_argument("--write", action="store_true", help="only write the tables and the picture")
    options = parser.parse_args()
    cells = [cell for table in options.tables.split(",") for cell in cells_of(table)]
    wanted = [cell for cell in cells if re.search(options.only, cell.name)]
    left = missing(wanted, options.results, options.search_tokens)
    if options.list:
        for cell in dict.fromkeys(wanted):
            print(f"{'missing ' if cell in left else 'measured'} {cell.name}")
        return
    failed = 0
    if not options.write:
        failed = run(left, options.jobs, options.results, options.work, options.search_tokens)
    if options.results == RESULTS:
        import quality_tables

        quality_tables.write(RESULTS)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
