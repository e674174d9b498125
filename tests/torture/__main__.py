"""Run the trials: ``python -m torture --minutes 3 --only kills mutations``; ``make torture`` does it.

Each kind runs in a process of its own and writes ``torture-KIND.json``. Two run at once where there are two cores. The
time is divided in the shares of ``KINDS``; with less than 30 minutes each trial is asked for its share of the full
number. The exit code is 1 if anything failed, or if a trial was not begun.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A kind is given so much more than its time to end what it has begun.
GRACE_SECONDS = 240
# By lane, the share of the lane's time for each kind.
KINDS = [
    {"kills": 0.97},
    {"saving": 0.08, "numbers": 0.2, "disk": 0.12, "concurrency": 0.12, "mutations": 0.3, "kernels": 0.15},
]


def main() -> int:
    every = [kind for lane in KINDS for kind in lane]
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it; 30 reaches the full numbers")
    parser.add_argument("--seed", type=int, help="of everything that is drawn; default: a random one, which is printed")
    parser.add_argument("--only", nargs="*", choices=every, default=every, metavar="KIND", help=", ".join(every))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for torture-KIND.json"
    )
    parser.add_argument("--case", help="FORMAT:NUMBER: show that mutation of --seed, and what becomes of it, alone")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 30)
    options.out = options.out.resolve()

    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
        "COLUMNS": "400",
    }
    from runner import commit

    from torture.harness import load_everything

    made_by = commit()
    load_everything()
    if options.case:
        from torture.mutations import show

        return show(options.case, seed)
    print(f"torture: {options.minutes:g} minutes, seed {seed}", flush=True)
    chosen = [{kind: share for kind, share in lane.items() if kind in options.only} for lane in KINDS]
    chosen = [lane for lane in chosen if lane]
    seconds = 60 * options.minutes
    if (os.cpu_count() or 1) < 2:  # one after another
        chosen = [{kind: share / len(chosen) for lane in chosen for kind, share in lane.items()}]
    with tempfile.TemporaryDirectory(prefix="torture-results-") as results:
        lanes = [
            _start_lane(lane, seconds, seed, options.minutes, options.out, Path(results), made_by) for lane in chosen
        ]
        for lane in lanes:
            os.waitpid(lane, 0)
        told = {file.stem: json.loads(file.read_text()) for file in Path(results).iterdir()}
    bad = 0
    for kind in (kind for lane in chosen for kind in lane):
        found = told.get(kind, {"failed": 1, "line": "did not report"})
        bad += found["failed"]
        print(f"torture {kind}: {found['line']}")
    print(f"torture: {f'{bad} failed' if bad else 'nothing failed'}; {options.out}/torture-*.json")
    return 1 if bad else 0


def _start_lane(
    lane: dict[str, float], seconds: float, seed: int, minutes: float, out: Path, results: Path, made_by: str
) -> int:
    """A process that runs the kinds of a lane one after another; its number."""
    child = os.fork()
    if child:
        return child
    try:
        left, shares = seconds, sum(lane.values())
        for kind, share in lane.items():
            limit = min(share * seconds / max(shares, 1.0), left)
            began = time.monotonic()
            line = _run_kind(kind, limit, seed, minutes, out, made_by)
            (results / f"{kind}.json").write_text(json.dumps(line))
            left = max(left - (time.monotonic() - began), 1.0)
    finally:
        sys.stdout.flush()
        os._exit(0)


def _run_kind(kind: str, seconds: float, seed: int, minutes: float, out: Path, made_by: str) -> dict[str, object]:
    from torture.harness import Report, forked

    def work() -> dict[str, object]:
        report = Report(kind, seed, minutes, out, made_by)
        try:
            importlib.import_module(f"torture.{kind}").run(report, seconds)
        finally:
            report.write()
        done = sum(part.done for part in report.parts.values())
        asked = sum(part.asked for part in report.parts.values())
        line = f"{done} of {asked} trials, {report.failed} failed"
        return {"failed": report.failed, "line": line}

    ended = forked(work, seconds + GRACE_SECONDS)
    if ended.code == 0 and ended.value is not None:
        return dict(ended.value)
    why = (
        f"hung for {seconds + GRACE_SECONDS:.0f} s" if ended.hung else f"exit code {ended.code}: {ended.error[-1500:]}"
    )
    return {"failed": 1, "line": why}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        raise SystemExit(main())
