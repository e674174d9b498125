"""Runs ``msp`` in processes of its own, and kills it at random moments until the last run is let through.

Four fifths of a small run are imports. A server that has done them is forked for a run that is killed: so kills land in
the work. All forks share the seed of the server's hashes; the last run is a new Python with another seed.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "matplotlib.pyplot",
        "transformers.models.llama.modeling_llama",
        "msp.verbs.info",
        "msp.cli.running",
        "msp.verbs.pareto",
        "msp.show.pictures",
        "msp.verbs.prune",
        "msp.show.report",
        "msp.verbs.search",
        "msp.session.streamed_workbench",
    ]
)


@dataclass
class Killed:
    """What became of a command: after how many seconds it was killed each time, and what its last run said."""

    after: list[float]
    stdout: str
    stderr: str


class Forked:
    """``msp`` in a fork of the server, in ``folder``, on one thread."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path) -> None:
        self._said = [folder.parent / f"{folder.name}.{stream}" for stream in ("out", "err")]
        self._process = FORKS.Process(target=_run, args=([*map(str, arguments)], folder, self._said))
        self._process.start()

    def ends_within(self, seconds: float | None) -> bool:
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> bool:
        """Whether the signal ended it: it may have ended by itself a moment before."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def result(self) -> tuple[int | None, str, str]:
        """After it ended: the exit code, and what it said on both streams."""
        stdout, stderr = (file.read_text() for file in self._said)
        return self._process.exitcode, stdout, stderr


def _run(arguments: list[str], folder: Path, said: list[Path]) -> None:
    import torch

    from msp.cli import main

    os.environ |= ENVIRONMENT
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as `python -m msp` has it
    for descriptor, file in zip((1, 2), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["msp", *arguments]
    main()


def run_fresh(arguments: Sequence[str | Path], folder: Path, **environment: str) -> Killed:
    """``msp`` as a user starts it, in a new Python with hash seeds of its own; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "msp", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Killed([], done.stdout, done.stderr)


def run_forked(arguments: Sequence[str | Path], folder: Path) -> tuple[int | None, str, str]:
    """The exit code of a run, and what it says on both streams."""
    run = Forked(arguments, folder)
    run.ends_within(None)
    return run.result()


def run_once(arguments: Sequence[str | Path], folder: Path) -> tuple[float, Killed]:
    """How long a run takes, which nothing disturbs, and what it says; it must succeed."""
    start = monotonic()
    code, *said = run_forked(arguments, folder)
    assert code == 0, said
    return monotonic() - start, Killed([], *said)


def run_and_kill(
    arguments: Sequence[str | Path],
    folder: Path,
    *,
    seconds: float,
    kills: int,
    draw: random.Random,
    resume: Sequence[str] = ("--resume",),
) -> Killed:
    """Run ``msp`` in ``folder`` and kill it ``kills`` times, each time a random while after it began; then let it end.

    The last run must succeed.

    Args:
        seconds: what an undisturbed run takes; moments are drawn evenly from it, so that a run on a busy machine is
            killed early and one on an idle machine may end before: then nothing is left to kill.
        resume: added to every run after the first.
    """
    after: list[float] = []
    while len(after) < kills:
        run = Forked([*arguments, *(resume if after else ())], folder)
        moment = draw.uniform(0, seconds)
        if run.ends_within(moment) or not run.kill():
            code, *said = run.result()
            assert code == 0, said
            return Killed(after, *said)
        after.append(moment)
    ended = run_fresh([*arguments, *resume], folder)
    ended.after = after
    return ended


def bytes_below(folder: Path) -> dict[str, str]:
    """The hash of every file below ``folder``, by its path from there."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
