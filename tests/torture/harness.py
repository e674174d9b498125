"""What every trial needs: counts and a results file, deadlines, work in processes that may die, and a place to work."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import json
import os
import pickle
import platform
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner import commit, processor

# The length at which every trial is asked for its full number.
FULL_MINUTES = 30.0
# More failures of one kind are counted but not described.
DESCRIBED = 20


@dataclass
class Part:
    """One row of a results file: ``asked`` trials, how many were ``done``, and what became of them.

    Attributes:
        what: by name, how many trials ended so; no judgement.
        failed: by kind of failure (``lost``, ``wrong``, ``leftover``, ``traceback``, ``crash``, ``hang``, ``memory``).
    """

    asked: int
    done: int = 0
    what: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)

    def goes_on(self, deadline: float) -> bool:
        """Whether there is another trial to do: one at least, however short the time is."""
        return self.done < self.asked and (not self.done or time.monotonic() < deadline)

    def to_json(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "done": self.done,
            "failed": sum(self.failed.values()),
            "failures": dict(self.failed),
            "ended": dict(sorted(self.what.items())),
            **self.notes,
        }


class Report:
    """Collects the trials of one kind and writes them down."""

    def __init__(self, kind: str, seed: int, minutes: float, out: Path, made_by: str = "") -> None:
        self.kind, self.seed, self.minutes = kind, seed, minutes
        self.made_by = made_by or commit()  # of the code that runs, whatever is committed meanwhile
        self.path = out / f"torture-{kind}.json"
        self.parts: dict[str, Part] = {}
        self.failures: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self._start = time.monotonic()

    def part(self, name: str, full: int) -> Part:
        """A new row, asked for its share of the ``full`` number; at least one."""
        self.parts[name] = Part(max(1, round(full * min(1.0, self.minutes / FULL_MINUTES))))
        return self.parts[name]

    def fail(self, name: str, kind: str, why: str, **again: Any) -> None:
        """Count a failure of the row ``name``; ``again`` is what shows it once more."""
        part = self.parts[name]
        part.failed[kind] += 1
        if part.failed[kind] <= DESCRIBED:
            self.failures.append({"part": name, "failure": kind, "why": why[-2000:], **again})
            print(f"torture {self.kind}: {name}: {kind}: {why[-300:]} {again}", flush=True)

    @property
    def failed(self) -> int:
        empty = sum(not part.done for part in self.parts.values())
        return empty + sum(sum(part.failed.values()) for part in self.parts.values())

    def write(self) -> None:
        content = {
            "kind": self.kind,
            "commit": self.made_by,
            "seed": self.seed,
            "minutes_asked": self.minutes,
            "seconds": round(time.monotonic() - self._start, 1),
            "machine": machine(),
            "asked": sum(part.asked for part in self.parts.values()),
            "done": sum(part.done for part in self.parts.values()),
            "failed": self.failed,
            **self.notes,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "failures": self.failures,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def machine() -> dict[str, Any]:
    import torch
    import transformers

    import msp

    versions = {"msp": msp.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {**versions, "python": platform.python_version()},
    }


class Shares:
    """Divides the time until a deadline evenly among parts that begin one after another."""

    def __init__(self, seconds: float, parts: int) -> None:
        self._end = time.monotonic() + seconds
        self._left = parts

    def next(self) -> float:
        """The deadline of the part that begins now; what earlier ones left over is shared."""
        now = time.monotonic()
        share = (self._end - now) / max(1, self._left)
        self._left -= 1
        return now + max(share, 0.0)

    def rest(self) -> float:
        """The deadline of all."""
        return self._end


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder of its own that goes afterwards; links resolved."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="torture-")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Ended:
    """How a process of ours ended: its exit code, or minus the signal; ``value`` is what its work returned."""

    code: int | None
    value: Any = None
    error: str = ""
    seconds: float = 0.0

    @property
    def hung(self) -> bool:
        return self.code is None


def start(work: Callable[[], object], output: Path | None = None) -> int:
    """Fork a process for ``work``, which ends with it; its number. Standard output and error go to ``output``."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # what the parent cleans up stays
        os.setpgid(0, 0)
        faulthandler.disable()
        if output is not None:
            out, err = (os.open(f"{output}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for end in ("out", "err"))
            os.dup2(out, 1), os.dup2(err, 2)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w", closefd=False)) for fd in (1, 2))
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit code of ``child``, or minus the signal that ended it; None if it still runs after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(0.002, left))


def kill(child: int) -> None:
    """SIGKILL a process of ours and all that it started, and take its end off the list."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def forked(work: Callable[[], object], seconds: float, *, more_bytes: int | None = None) -> Ended:
    """Run ``work`` in a process of its own, which may crash, hang or take too much memory."""
    reader, writer = os.pipe()

    def whole() -> None:
        os.close(reader)
        if more_bytes is not None:
            limit_memory(more_bytes)
        try:
            found = (work(), "")
        except BaseException:
            found = (None, traceback.format_exc())
        with os.fdopen(writer, "wb") as stream:
            pickle.dump(found, stream)
        if found[1]:
            os._exit(70)

    began = time.monotonic()
    child = start(whole)
    os.close(writer)
    data, deadline = b"", began + seconds
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            os.close(reader)
            kill(child)
            return Ended(None, seconds=seconds)
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        data += piece
    os.close(reader)
    code = wait(child, 30)
    if code is None:
        kill(child)
    value, error = pickle.loads(data) if data else (None, "")
    return Ended(code, value, error, time.monotonic() - began)


def limit_memory(more_bytes: int) -> None:
    """Let this process map ``more_bytes`` beyond what it has mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, resource.RLIM_INFINITY))


def command(arguments: list[str], folder: Path, **environment: str) -> Callable[[], None]:
    """``msp`` with ``arguments`` in ``folder``, as work for ``start``: the modules are loaded already."""

    def run() -> None:
        os.chdir(folder)
        os.environ.update(environment)
        tempfile.tempdir = None  # found again from TMPDIR
        sys.argv = ["msp", *arguments]
        from msp.cli import main

        main()

    return run


def load_everything() -> None:
    """Import what a run imports, once: processes that are forked afterwards begin with the work itself."""
    import matplotlib.pyplot
    import yaml
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    import msp
    import msp.cli
    import msp.cli.demo
    import msp.cli.running
    import msp.engine.evolution
    import msp.evidence.decode_times
    import msp.evidence.streamed
    import msp.models.stored
    import msp.packed.checkpoint
    import msp.packed.dense
    import msp.session.streamed_workbench
    import msp.show.pictures
    import msp.show.report
    import msp.verbs.generate
    import msp.verbs.info
    import msp.verbs.pareto

    msp.cli.running.calm_libraries()
    del matplotlib, yaml, GPT2LMHeadModel, LlamaForCausalLM
