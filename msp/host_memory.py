"""Memory of this process that it no longer uses."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
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
