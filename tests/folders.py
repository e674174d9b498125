"""What is in a folder, and a disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def listing(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@contextmanager
def small_files() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond 20 KB, as a full disk would.

    Not a fixture: pytest reports a test before it tears fixtures down, and its own output may be such a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
