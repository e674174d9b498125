"""How pytest-xdist deals out the tests: whole files, and the files that take longest first."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Any

# Files that one worker runs one after another.
TOGETHER = {
    # each process compiles and reads the GPU kernels for itself, which takes long
    "kernels": (
        "test_cubin",
        "test_cubin_fisher",
        "test_cubin_obs_prune",
        "test_cubin_spmm",
        "test_kernel_table",
        "test_nm_linear_cubin",
        "test_triton_compile",
    ),
    # Ray gives up where its processes do not start in time, as they may not beside another cluster's
    "ray": ("test_determinism", "test_distributed", "test_compressions"),
}
# From the longest on. If one of these came last, the other workers would wait for it.
LONG = (
    "ray",
    "test_wheel",
    "test_real_llm",
    "kernels",
    "test_quality",
    "test_device",
    "test_onward",
    "test_kill_points",
    "test_transformers",
    "test_cli",
    "test_imports",
    "test_examples",
    "test_golden",
    "test_torture",
)


def share_of(nodeid: str) -> str:
    """What one worker runs as a whole: the file of the test, or the files that stay together with it."""
    file = nodeid.partition("::")[0]
    stem = PurePosixPath(file).stem
    return next((name for name, files in TOGETHER.items() if stem in files), file)


def place_of(nodeid: str) -> int:
    """The place of the test's share in ``LONG``; every other share comes after these."""
    name = PurePosixPath(share_of(nodeid)).stem
    return LONG.index(name) if name in LONG else len(LONG)


def takes_long(nodeid: str) -> bool:
    """Whether the test's share is in ``LONG``."""
    return place_of(nodeid) < len(LONG)


def threads_of_a_worker(workers: int) -> int:
    """The number of threads with which all workers together use every core once."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def scheduling(config: Any, log: Any) -> Any:
    """The scheduler of ``--dist loadfile``, with the shares and the order of this module."""
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return share_of(nodeid)

    config.option.loadscopereorder = False  # by the number of their tests
    return Shares(config, log)
