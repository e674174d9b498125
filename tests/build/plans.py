"""What each CUDA kernel is planned to leave of a multiprocessor to others; ``test_cubin.py`` holds it to that.

A kernel that is not listed is taken to need no dynamic shared memory and to be alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cubins import Kernel


@dataclass(frozen=True)
class Plan:
    """``blocks`` on one multiprocessor, each with as much dynamic shared memory as a launch asks for at most."""

    blocks: int = 1
    dynamic_shared: Callable[[Kernel], int] = lambda kernel: 0


def select_shared(kernel: Kernel) -> int:
    """The kept values of a block where all are kept: ``SelectBlock::shared_bytes``."""
    dtype, group_size, _ = map(int, kernel.arguments)
    return kernel.threads * max(8, group_size) * (4 if dtype == 0 else 2)


def obs_prune_shared(kernel: Kernel) -> int:
    """The factor's corner, the tile, the reciprocals, a group's errors and the mask: ``ObsShared``."""
    return 4 * (4 * 528 * 4 + 128 * 34 + 128 + 32 * 32 + 4 * 32)


# Of obs_prune: large groups leave room by registers for one
PLANS = {"nm_select_kernel": Plan(4, select_shared), "obs_prune_kernel": Plan(1, obs_prune_shared)}


def plan_of(kernel: Kernel) -> Plan:
    return PLANS.get(kernel.family, Plan())
