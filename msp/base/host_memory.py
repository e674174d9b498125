"""The host memory of this process: how much it takes, may still take, and no longer uses."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any


def give_back() -> None:
    """Return freed host memory to the system, as far as the C library can.

    glibc keeps what was freed below the top of its heap, which after a model or large temporary tensors is hundreds of
    megabytes that nothing else on the machine can have.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none


def resident() -> int:
    """Bytes of this process that are in memory now."""
    if sys.platform.startswith("linux"):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes


def peak() -> int:
    """The most bytes of this process that were in memory at a time; 0 if the system does not tell.

    Linux counts them for the program that runs now. ``ru_maxrss`` also counts the process that started it, so a small
    program that a large one started would show the size of the large one.
    """
    if sys.platform.startswith("linux"):
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes


def available(mapped: int = 0) -> int:
    """Bytes that this process may still take: the least that the machine, the control groups and its limits leave.

    Args:
        mapped: bytes of files that will be mapped. They count only against the limits of the process, because the
            system frees their pages when it needs memory.
    """
    rooms = [_free_on_machine()]
    for name, counted in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            rooms.append(limit - _status(counted) - mapped)
    rooms += _rooms_of_groups()
    return max(0, min(rooms))


def _free_on_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _status(name: str) -> int:
    """A size in ``/proc/self/status``, in bytes; 0 if the file or the entry is absent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else 0


def _rooms_of_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the control group of this process and each group above it leave; inactive cache counts as free."""
    if not groups.exists():
        return []
    rooms = []
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            names, top = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "memory"
        else:
            continue
        folder = top / path.strip("/")
        while folder == top or top in folder.parents:
            rooms += _room_of_group(folder, *names)
            folder = folder.parent
    return rooms


def _room_of_group(folder: Path, limit: str, current: str, cache: str) -> list[int]:
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, current))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [] if most == "max" else [int(most) - int(taken) + int(statistics.get(cache, 0))]
    except (OSError, ValueError):
        return []
