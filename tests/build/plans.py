"""What each CUDA kernel is planned to leave of a multiprocessor to others; ``test_cubin.py`` holds it to that.

A kernel that is not listed is taken to need no dynamic shared memory and to be alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cubins import LIMITS, Kernel

from msp.ops.linear import plan as linear_plans


@dataclass(frozen=True)
class Plan:
    """``blocks`` on one multiprocessor of the kernel's target, each with ``dynamic_shared`` bytes of shared memory."""

    blocks: int = 1
    dynamic_shared: int = 0


def select_shared(kernel: Kernel) -> int:
    """The kept values of a block where all are kept: ``SelectBlock::shared_bytes``."""
    dtype, group_size, _ = map(int, kernel.arguments)
    return kernel.threads * max(8, group_size) * (4 if dtype == 0 else 2)


# how the plan of a product calls what a kernel does
LINEAR_FORMS: dict[str, linear_plans.How] = {
    "nm_linear_gather_kernel": "gather",
    "nm_linear_group_kernel": "gather",
    "nm_linear_expand_kernel": "expand",
}


def linear_plan(kernel: Kernel, columns: int = 4096) -> Plan:
    """As the host cuts a weight of so many columns on a GPU of the kernel's target, with rows enough to fill it."""
    how, at_once = LINEAR_FORMS[kernel.family], int(kernel.arguments[-1])
    device = linear_plans.Device(1, LIMITS[kernel.capability].shared_bytes)
    splits = linear_plans.cut(how, at_once, at_once, 4096, columns, device).splits
    return Plan(
        linear_plans.resident_blocks(how, at_once, columns, device),
        linear_plans.shared_bytes(how, at_once, columns, splits),
    )


def obs_prune_shared(kernel: Kernel) -> int:
    """The factor's corner, the tile, the reciprocals, a group's errors and the mask: ``ObsShared``."""
    return 4 * (4 * 528 * 4 + 128 * 34 + 128 + 32 * 32 + 4 * 32)


def spmm_tokens(kernel: Kernel) -> int:
    """Of a tile, from ``SpmmShape<row warps, token warps, slabs, octets>``."""
    shape = re.search(r"SpmmShape<(\d+), (\d+), (\d+), (\d+)>", kernel.name)
    assert shape, kernel.name
    return int(shape[2]) * int(shape[4]) * 8


def spmm_sm80_shared(kernel: Kernel) -> int:
    """Stages of 128 rows of fragments and as many bytes of each token: ``SpmmPipeline::kSharedBytes``."""
    stages = int(kernel.name.rstrip(">").rpartition(",")[2])
    return stages * (8 * 1152 + spmm_tokens(kernel) * 128)


def spmm_epilogue_shared(tokens: int) -> int:
    """A tile of 128 rows, 8 more a token: ``SpmmEpilogue::kSharedBytes``."""
    return tokens * (128 + 8) * 2


def spmm_sm90_shared(kernel: Kernel) -> int:
    """Four stages of x, the epilogue's tile and eight barriers: ``Sm90Layout::kSharedBytes``. Elsewhere it is empty."""
    if kernel.target != "sm_90a":
        return 0
    tokens = int(kernel.arguments[1])
    return 4 * tokens * 128 + spmm_epilogue_shared(tokens) + 64


PLANS: dict[str, Callable[[Kernel], Plan]] = {
    **dict.fromkeys(LINEAR_FORMS, linear_plan),
    "nm_linear_sum_kernel": lambda kernel: Plan(4),
    "nm_select_kernel": lambda kernel: Plan(4, select_shared(kernel)),
    "nm_spmm_pack_kernel": lambda kernel: Plan(6),
    "nm_spmm_sm80_kernel": lambda kernel: Plan(1, spmm_sm80_shared(kernel)),
    "nm_spmm_sm90_kernel": lambda kernel: Plan(1, spmm_sm90_shared(kernel)),
    "nm_spmm_sum_kernel": lambda kernel: Plan(3, spmm_epilogue_shared(spmm_tokens(kernel))),
    # of the largest groups registers leave room for one; test_cubin_obs_prune.py has the others
    "obs_prune_kernel": lambda kernel: Plan(1, obs_prune_shared(kernel)),
}


def plan_of(kernel: Kernel) -> Plan:
    return PLANS[kernel.family](kernel) if kernel.family in PLANS else Plan()
