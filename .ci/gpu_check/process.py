"""Commands that may hang or die without affecting others."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """``code`` is None if the time limit ended it; ``out`` is its output until then."""

    code: int | None
    out: str
    errors: str
    seconds: float

    def tail(self, lines: int = 25) -> str:
        return "\n".join((self.out + "\n" + self.errors).strip().splitlines()[-lines:])


def run(command: list[str], limit: float, *, cwd: Path = ROOT, **environment: str) -> Done:
    """Run it in a process group of its own, which is killed with all its processes after ``limit`` seconds."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            return Done(127, "", str(error), 0.0)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Done(code, *texts, time.monotonic() - start)
