"""Locks on places that are written to: one run at a time. The kernel lets go when a process ends, however it ends.

A lock is a file that is held with ``flock`` and says who holds it: beside a file or a folder that is replaced as a
whole, or inside a folder that is written into. It is removed when the work is done. A lock file that is there and not
held belongs to a process that was killed; nothing else (neither its age nor its pid) says so.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from msp.base.reading import parse_json
from msp.errors import MspError, system_reason

SUFFIX = ".msp-lock"
INSIDE = SUFFIX


@dataclass
class _Held:
    """A lock of this process. ``descriptor`` is None where the file system has no locks."""

    descriptor: int | None
    thread: int
    depth: int = 1


_held: dict[Path, _Held] = {}


def beside(target: Path) -> Path:
    """The lock of a file or folder that is replaced as a whole."""
    return target.with_name(f".{target.name}{SUFFIX}")


def inside(folder: Path) -> Path:
    """The lock of a folder that is written into: its parent may be closed to writers, like that of a mounted disk."""
    return folder / INSIDE


@contextmanager
def locked(lock: Path, name: str | Path) -> Iterator[bool]:
    """Hold the file ``lock`` for the length of the context; the same thread may enter it again meanwhile.

    Args:
        lock: as ``beside`` or ``inside`` names it, links resolved. Missing folders above it are made, and removed
            afterwards if nothing was put into them.
        name: of what is locked, for messages.

    Yields:
        Whether it is really held: some network file systems know no locks. A warning says so.

    Raises:
        MspError: another process or thread holds it, and which; or it cannot be written.
    """
    own = _held.get(lock)
    if own is not None and own.thread == threading.get_ident():
        own.depth += 1
        try:
            yield own.descriptor is not None
        finally:
            own.depth -= 1
        return
    made: list[Path] = []
    try:
        try:
            descriptor = _acquire(lock, name, made)
        except OSError as error:
            raise MspError(f"{name} cannot be written: {lock.parent}: {system_reason(error)}") from error
        _held[lock] = _Held(descriptor, threading.get_ident())
        try:
            yield descriptor is not None
        finally:
            del _held[lock]
            release(lock, descriptor)
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # it has something in it now
                os.rmdir(folder)


def make_folders(folder: Path) -> list[Path]:
    """Make ``folder`` and those above it that are missing, and return these, the outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    made = []
    for each in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(each)
            made.append(each)
    return made


def try_lock(lock: Path) -> int | None:
    """Hold a lock file that is there, as a descriptor for ``release``; None if its owner is alive or it is gone."""
    if lock in _held:
        return None
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not _is_at(descriptor, lock):
        os.close(descriptor)
        return None
    return descriptor


def release(lock: Path, descriptor: int | None) -> None:
    """Remove a lock file that is held, and let go of it."""
    if descriptor is None:
        return
    with suppress(OSError):  # it may have gone with its folder
        if _is_at(descriptor, lock):
            os.unlink(lock)
    os.close(descriptor)


def _acquire(lock: Path, name: str | Path, made: list[Path]) -> int | None:
    """Hold ``lock``; the folders above it that had to be made are added to ``made``."""
    while True:
        made += [folder for folder in make_folders(lock.parent) if folder not in made]
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            if lock.parent.is_dir():
                raise
            continue  # another run made the folder too, and has just removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise MspError(
                f"{name} is being written by {holder}: wait until that run has ended, or choose another place"
            ) from None
        except OSError as error:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(lock)
            warnings.warn(
                f"{name}: no lock can be held there ({error.strerror}): let no other run write to it", stacklevel=4
            )
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(descriptor, lock):
            break
        os.close(descriptor)  # its holder removed it between the two calls
    try:
        about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat("T", "seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
    except BaseException:
        release(lock, descriptor)
        raise
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        about = parse_json(os.pread(descriptor, 4096, 0))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"  # that has not written its name yet


def _is_at(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(lock))
    except OSError:
        return False


def _let_go() -> None:
    """A forked child would hold its parent's locks beyond the parent's death."""
    for held in _held.values():
        if held.descriptor is not None:
            os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
