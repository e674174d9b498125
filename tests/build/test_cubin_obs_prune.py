"""What nvcc made of the CUDA obs_prune."""

from __future__ import annotations

import cubins
import pytest
from plans import obs_prune_shared

GROUP_SIZES = (4, 8, 16, 32)
# by capability and group size: what shared memory or, for large groups, registers allow
BLOCKS = {
    (80, 4): 2, (80, 8): 2, (80, 16): 2, (80, 32): 1,
    (86, 4): 1, (86, 8): 1, (86, 16): 1, (86, 32): 1,
    (89, 4): 1, (89, 8): 1, (89, 16): 1, (89, 32): 1,
    (90, 4): 4, (90, 8): 4, (90, 16): 2, (90, 32): 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def kernels(cuda_kernels):
    return cubins.family(cuda_kernels, "obs_prune_kernel")


def test_every_group_size_is_there_for_every_target(kernels) -> None:
    import msp._cuda

    found = {(kernel.target, int(kernel.arguments[0])) for kernel in kernels}
    assert found == {(f"sm_{arch}", m) for arch in msp._cuda.archs() for m in GROUP_SIZES}


def test_occupancy_is_as_planned(kernels) -> None:
    for kernel in kernels:
        planned = BLOCKS.get((kernel.capability, int(kernel.arguments[0])))
        assert planned is None or kernel.blocks(dynamic_shared=obs_prune_shared(kernel)) >= planned, kernel


def test_memory_moves_in_quads_and_the_sweep_is_fused(kernels) -> None:
    for kernel in kernels:
        m = int(kernel.arguments[0])
        assert not kernel.spilled, kernel.name
        # the factor's and the weight's share of a thread; the corner is read whole too, as one address for a warp
        assert kernel.count("LDG", 128) >= 16 + 4, kernel.name
        assert kernel.count("STG", 128) >= 4 and kernel.count("LDS", 128) >= m, kernel.name
        # each pair inside a group, and a quad for each of the group's columns behind it
        assert kernel.count("FFMA") >= m * (m - 1) // 2 + 4 * m, kernel.name
        # no sum, no atomic: nothing whose order could change between two runs
        assert not kernel.count("RED") and not kernel.count("ATOM") and not kernel.count("ATOMS"), kernel.name
