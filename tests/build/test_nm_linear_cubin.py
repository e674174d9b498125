"""What nvcc made of ``nm_linear``: the instructions that were planned, in every instance and for every target."""

from __future__ import annotations

from collections import Counter

import cubins
from plans import LINEAR_FORMS, linear_plan

from msp.formats.patterns import GROUP_SIZES, NMPattern
from msp.ops.linear.plan import can_expand


def test_every_pattern_and_dtype_has_its_kernels(cuda_kernels) -> None:
    import msp._cuda

    units = {
        (8, 2 * n) if m == 4 else (m, n)
        for m in GROUP_SIZES
        for n in range(1, m)
        if can_expand(NMPattern(n, m)) and msp._cuda.nm_linear_has("expand", m, n, 8)
    }
    for arch in msp._cuda.archs():
        here = [kernel for kernel in cuda_kernels if kernel.target == f"sm_{arch}"]
        expand = Counter(kernel.arguments for kernel in cubins.family(here, "nm_linear_expand_kernel"))
        gather = Counter(kernel.arguments for kernel in cubins.family(here, "nm_linear_gather_kernel"))
        assert set(expand) == {
            (dtype, str(unit), str(kept), tokens)
            for dtype in "12"
            for unit, kept in units
            for tokens in ("8", "16", "32")
        }
        assert set(gather) == {(dtype, step, tokens) for dtype in "12" for step in "248" for tokens in "124"}
        group = Counter(kernel.arguments for kernel in cubins.family(here, "nm_linear_group_kernel"))
        assert set(group) == {(dtype, tokens) for dtype in "12" for tokens in "12"}
        assert len(cubins.family(here, "nm_linear_sum_kernel")) == 2


def test_blocks_fit_however_the_host_cuts_the_work(cuda_kernels) -> None:
    """Two on one multiprocessor or one, as ``msp.ops.linear.plan`` wants them on a GPU of each target."""
    for name in LINEAR_FORMS:
        for kernel in cubins.family(cuda_kernels, name):
            for columns in (256, 1024, 4096, 11008, 28672):
                plan = linear_plan(kernel, columns)
                assert kernel.blocks(dynamic_shared=plan.dynamic_shared) >= plan.blocks, (kernel, columns)


def test_weights_come_16_bytes_at_a_time(cuda_kernels) -> None:
    for name in ("nm_linear_gather_kernel", "nm_linear_group_kernel", "nm_linear_expand_kernel"):
        for kernel in cubins.family(cuda_kernels, name):
            assert kernel.count("LDGSTS", 128) >= 7, kernel.name  # the ring is filled before the loop
            assert kernel.count("LDGSTS") == kernel.count("LDGSTS", 128), kernel.name
            assert kernel.count("LDG", 128), kernel.name  # the bitmask
            assert kernel.count("LDS", 128), kernel.name  # the values


def test_expanded_weights_go_to_tensor_cores(cuda_kernels) -> None:
    for kernel in cubins.family(cuda_kernels, "nm_linear_expand_kernel"):
        _, _, kept, tokens = map(int, kernel.arguments)
        products = kernel.count("HMMA", 16816)
        # a tile is 16 steps of 16 columns, unrolled at least by half
        assert products % (8 * tokens // 8) == 0 and products, kernel.name
        # four registers of two columns for each row and byte of the bitmask, cleared only where four or more are kept
        places = products // (tokens // 8) * 4
        assert kernel.count("PRMT") >= places * (2 if kept >= 4 else 1), kernel.name
        lookup = kernel.count("LDS", 128 if kept >= 4 else 64)
        assert lookup >= places // 4, kernel.name
        assert kernel.count("FLO") == 0, kernel.name


def test_gathered_weights_cost_one_search_each(cuda_kernels) -> None:
    for kernel in cubins.family(cuda_kernels, "nm_linear_gather_kernel"):
        _, step, tokens = map(int, kernel.arguments)
        kept = 4 * step  # four words are unrolled
        assert kernel.count("FLO", "U32") >= kept, kernel.name
        assert kernel.count("LDS", "U16") == kernel.count("FFMA") == kernel.count("FLO", "U32") * tokens, kernel.name
        assert kernel.count("HMMA") == 0, kernel.name


def test_a_group_has_each_way_to_gather(cuda_kernels) -> None:
    for kernel in cubins.family(cuda_kernels, "nm_linear_group_kernel"):
        tokens = int(kernel.arguments[1])
        assert kernel.count("FLO", "U32") >= 4 * (2 + 4 + 8), kernel.name
        assert kernel.count("LDS", "U16") == kernel.count("FFMA") == kernel.count("FLO", "U32") * tokens, kernel.name
