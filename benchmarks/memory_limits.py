"""A run under a limit of memory: whole, streamed, or refused before it begins.

    python benchmarks/memory_limits.py

Prunes the random model of ``memory.py`` uniformly in a control group of its own (version 1 or 2; creating one needs the
rights of root) at several limits, and writes ``benchmarks/results/memory-limits.json``: the outcome of each run, its
KL, and the most bytes of the group. Pages of the weight file that other groups read count there, not here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory import RESULTS, make

LIMITS = (1_500_000_000, 1_100_000_000, 900_000_000, 700_000_000, 550_000_000, 400_000_000)
TOKENS = {"window": 128, "calibration-tokens": 1024, "fitness-tokens": 256, "test-tokens": 256}


@contextmanager
def control_group(limit: int) -> Iterator[tuple[Path, str]]:
    """A group whose processes together may use ``limit`` bytes, and the file with their peak."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()
    folder = (root / "memory" if first else root) / f"msp-limit-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        if not first:
            (folder / "memory.swap.max").write_text("0")
        yield folder, "memory.max_usage_in_bytes" if first else "memory.peak"
    finally:
        folder.rmdir()


def run(limit: int, folder: Path) -> dict[str, Any]:
    options = [f"--{name}={count}" for name, count in TOKENS.items()]
    command = [sys.executable, "-m", "msp", "prune", str(folder / "model"), "-o", str(folder / f"out-{limit}")]
    command += ["--sparsity", "0.75", "--allocator", "uniform", "--device", "cpu", "--no-pictures", "--json", *options]
    command += ["--calibration", str(folder / "tokens.safetensors")]
    with control_group(limit) as (group, most):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None,
        )
        peak = int((group / most).read_text())
    said = [line for line in done.stderr.splitlines() if line.startswith(("msp: ", "warning: "))]
    record: dict[str, Any] = {"limit": limit, "exit_code": done.returncode, "peak": peak}
    record["said"] = said[-1].replace(str(folder), "FOLDER") if said else None
    if done.returncode == 0:
        record["kl"] = json.loads(done.stdout)["kl"]
    record["outcome"] = "refused" if done.returncode else "streamed" if said else "whole"
    print(record, flush=True)
    return record


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as name:
        parameters = make(Path(name), 14, 1024)
        runs = [run(limit, Path(name)) for limit in LIMITS]
    content = {"commit": commit.stdout.strip(), "parameters": parameters, "runs": runs}
    (RESULTS / "memory-limits.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
