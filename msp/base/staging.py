"""Files and folders that are there as a whole or not at all, after a kill or a power cut too.

A new NAME is written to ``.NAME.msp-partial/new``, beside NAME and on the same file system, while NAME's lock is held.
It reaches the disk before it takes NAME's place in one step. The step is an exchange where the system has it. Else it
is two renames, and the folder itself is their journal: with ``new`` and ``old`` in it and no NAME, the next run
finishes the second one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from msp.base.locks import INSIDE, SUFFIX, beside, locked, release, try_lock
from msp.errors import MspError, system_reason

PARTIAL = ".msp-partial"
NEW, OLD = "new", "old"
# of renameat2(2)
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# What renameat2 fails with where kernel or file system have no exchange.
NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path to write to, free and on the file system of ``target``; what is left of it goes with the context.

    Raises:
        MspError: another run writes to ``target``.
        OSError: it cannot be written there.
    """
    with locked(beside(target), target) as held:
        place = partial_of(target)
        if held:
            clean(target)
        else:  # no run can tell what a living one is writing from what a dead one has left
            place = place.with_name(f"{place.name}-{uuid.uuid4().hex[:8]}")
        os.mkdir(place)
        try:
            yield place / NEW
        finally:
            _undo(place, target)
            shutil.rmtree(place, ignore_errors=True)


def scratch_folder(owner: object, name: str, folder: Path | None = None) -> Path:
    """An empty folder that goes with ``owner``, in ``folder`` or where the system has temporary files.

    One of a process that was killed goes when another is made, or at the latest with the next run in ``folder``.

    Raises:
        MspError: it cannot be made.
    """
    if folder is None:
        try:
            folder = Path(os.path.realpath(tempfile.gettempdir()))
        except OSError as error:
            raise MspError(f"{error}: set TMPDIR to a folder with room in it") from error
        name = f"msp-{name}-{uuid.uuid4().hex[:8]}"
    folder = Path(os.path.realpath(folder))
    with ExitStack() as stack:
        try:
            clean_folder(folder)
            place = stack.enter_context(staged(folder / name))
            place.mkdir()
        except OSError as error:
            raise MspError(f"{folder / name} cannot be made: {system_reason(error)}") from error
        weakref.finalize(owner, stack.pop_all().close)
    return place


def put_in_place(new: Path, target: Path) -> None:
    """Have ``new``, from ``staged``, take the place of ``target`` in one step that outlasts a power cut.

    A folder that stood there goes with the context of ``staged``.
    """
    sync(new)
    if new.is_dir() and os.path.lexists(target):
        if not exchange(new, target):
            os.rename(target, new.with_name(OLD))
            sync_folder(new.parent)
            os.rename(new, target)
    else:
        os.replace(new, target)
    sync_folder(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Have two paths of one file system change places in one step; False where that is not to be had.

    Raises:
        OSError: it failed for another reason.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    call: Callable[..., int] | None = getattr(libc, "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def partial_of(target: Path) -> Path:
    """The folder in which ``target`` is written."""
    return target.with_name(f".{target.name}{PARTIAL}")


def clean(target: Path) -> None:
    """Finish or remove what a run that was killed has left of ``target``, whose lock is held."""
    place = partial_of(target)
    if not place.is_dir():
        return
    old, new = place / OLD, place / NEW
    if old.exists() and new.exists() and not os.path.lexists(target):
        os.rename(new, target)
        sync_folder(target.parent)
    _undo(place, target)
    shutil.rmtree(place, ignore_errors=True)


def clean_folder(folder: Path) -> None:
    """Finish or remove what killed runs have left in ``folder``: all whose lock file nobody holds any more."""
    for lock in folder.glob(f".*{SUFFIX}"):
        if lock.name == INSIDE:
            continue  # of the folder itself, which its next user takes over
        descriptor = try_lock(lock)
        if descriptor is not None:
            try:
                with suppress(OSError):
                    clean(lock.with_name(lock.name[1 : -len(SUFFIX)]))
            finally:
                release(lock, descriptor)


def sync(path: Path) -> None:
    """Have a file, or a folder with all below it, reach the disk.

    Raises:
        OSError: it does not.
    """
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        sync_folder(path)
    elif stat.S_ISREG(path.lstat().st_mode):
        _sync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` reach the disk, where its file system can be asked to."""
    try:
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _undo(place: Path, target: Path) -> None:
    """Put what stood at ``target`` back if the second of two renames has not come."""
    old = place / OLD
    if old.exists() and not os.path.lexists(target):
        os.rename(old, target)
