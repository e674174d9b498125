"""Kills ``msp`` without a chance to say goodbye, at random moments, until the last run is let through."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Killed:
    """What became of a command: how often it was killed, after how many seconds, and how the last run of it ended."""

    after: list[float] = field(default_factory=list)
    code: int | None = None
    stdout: str = ""
    stderr: str = ""


def command(*arguments: str | Path) -> list[str]:
    """``msp`` of the code under test."""
    return [sys.executable, "-m", "msp", *map(str, arguments)]


def run_once(arguments: Sequence[str | Path], folder: Path, **environment: str) -> tuple[float, Killed]:
    """How long a run takes, which nothing disturbs, and what it says; it must succeed."""
    start = time.monotonic()
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return time.monotonic() - start, Killed([], 0, done.stdout, done.stderr)


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

    Args:
        seconds: what an undisturbed run takes; moments are drawn evenly from it, so that a run on a busy machine is
            killed early and one on an idle machine may end before: then nothing is left to kill.
        resume: added to every run after the first.
    """
    found = Killed()
    while True:
        more = resume if found.after else ()
        process = subprocess.Popen(
            command(*arguments, *more),
            cwd=folder,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if len(found.after) < kills:
            moment = draw.uniform(0, seconds)
            try:
                found.stdout, found.stderr = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                assert process.returncode == -signal.SIGKILL
                found.after.append(moment)
                continue
        else:
            found.stdout, found.stderr = process.communicate()
        found.code = process.returncode
        return found


def bytes_below(folder: Path) -> dict[str, str]:
    """The hash of every file below ``folder``, by its path from there."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
