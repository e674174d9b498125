"""Kills a piece of work at every step that it takes on the file system, each time in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from msp.base import staging

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "open"}
DONE, FAILED = 0, 1


def killed_at_every_step(work: Callable[[], object], folder: Path, *, every: int = 1, first: int = 0) -> Iterator[int]:
    """The numbers of the steps, each yielded when ``work`` was killed ahead of it; ends when it was not killed.

    A step is a call that changes something below ``folder``, an fsync, or an exchange of two paths; after an exchange
    there is another one. With ``every``, it is every so many steps, from ``first`` on.
    """
    step = first
    while True:
        child = os.fork()
        if not child:
            _work(work, folder, step)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == DONE, f"failed, but not killed, with step {step} to be killed at"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield step
        step += every


def _work(work: Callable[[], object], folder: Path, last: int) -> None:
    count = 0

    def step() -> None:
        nonlocal count
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event not in CHANGES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        removed = event in ("os.remove", "os.rmdir")  # by shutil.rmtree: a name in a folder that is open
        below = removed or os.path.realpath(os.fsdecode(arguments[0])).startswith(str(folder))
        flags = arguments[2] if event == "open" else os.O_WRONLY
        if below and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            step()

    fsync, exchange = os.fsync, staging.exchange

    def counted_fsync(descriptor: int) -> None:
        step()
        fsync(descriptor)

    def counted_exchange(one: Path, other: Path) -> bool:
        step()
        done = exchange(one, other)
        step()
        return done

    try:
        os.fsync, staging.exchange = counted_fsync, counted_exchange
        sys.addaudithook(hear)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(FAILED)
    os._exit(DONE)
