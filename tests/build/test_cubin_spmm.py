"""What nvcc made of nm_spmm: sparse tensor core instructions, fed the way the kernels were written to feed them."""

from __future__ import annotations

from collections import Counter

import cubins
import pytest
from plans import plan_of


@pytest.fixture(scope="module")
def of_sm80(cuda_kernels):
    return cubins.family(cuda_kernels, "nm_spmm_sm80_kernel")


@pytest.fixture(scope="module")
def of_sm90(cuda_kernels):
    """Elsewhere than on sm_90a its body is empty."""
    return [kernel for kernel in cubins.family(cuda_kernels, "nm_spmm_sm90_kernel") if kernel.target == "sm_90a"]


def test_every_variant_is_there(cuda_kernels) -> None:
    import msp._cuda

    for target in (f"sm_{arch}" for arch in msp._cuda.archs()):
        built = Counter(kernel.family for kernel in cuda_kernels if kernel.target == target)
        assert built["nm_spmm_pack_kernel"] == 4, target  # group sizes
        assert built["nm_spmm_sm80_kernel"] == 6, target  # dtypes and token tiles
        assert built["nm_spmm_sm90_kernel"] == 6, target
        assert built["nm_spmm_sum_kernel"] == 6, target


def test_mma_sp_is_fed_by_asynchronous_copies_16_bytes_at_a_time(of_sm80) -> None:
    for kernel in of_sm80:
        # of the tile's products, those of the two halves of a block of 64 columns
        products = kernel.count("HMMA", "SP", "16832")
        assert products in (8, 32, 64), kernel.name
        assert kernel.count("HMMA") == kernel.count("HMMA", "SP"), kernel.name
        assert kernel.count("LDGSTS", "BYPASS", 128) and kernel.count("LDGSTS") == kernel.count("LDGSTS", 128)
        # a thread's copies of a block, of the weight and of 128, 64 or 16 tokens, are never in a loop
        assert kernel.count("LDGSTS") % (5 + {64: 8, 32: 4, 8: 1}[products]) == 0, kernel.name
        # fragments of the weight in 16-byte loads, those of x by ldmatrix, y in 16-byte stores
        assert kernel.count("LDS", 128) >= 4 and kernel.count("LDSM", 4) >= 4, kernel.name
        assert kernel.count("STG", 128), kernel.name


def test_mma_sp_leaves_room_for_two_blocks(of_sm80) -> None:
    for kernel in of_sm80:
        if kernel.target == "sm_80":
            assert kernel.blocks(dynamic_shared=plan_of(kernel).dynamic_shared) >= 2, kernel.name


def test_wgmma_takes_the_weight_from_registers_and_x_from_bulk_copies(of_sm90) -> None:
    if not of_sm90:
        pytest.skip("msp._cuda is not built for sm_90a")
    for kernel in of_sm90:
        # two products of 32 columns in each of four stages, for both halves of the ring of weights
        assert kernel.count("HGMMA", "SP") == 16 and kernel.count("HGMMA") == 16, kernel.name
        assert kernel.count("UTMALDG", "2D") == 8 and kernel.count("UTMALDG", "MULTICAST") == 4, kernel.name
        assert kernel.count("STSM") and kernel.count("STG", 128), kernel.name
        assert kernel.count("USETMAXREG") == 2, kernel.name
        # the whole register file, shared out anew by setmaxnreg
        assert kernel.registers * kernel.threads <= 65536 and kernel.threads == 384, kernel.name
        # fences as wide as these are for the cluster's start and end, not for the loop over K
        assert kernel.count("MEMBAR", "GPU") <= 2 and kernel.count("CCTL") <= 2, kernel.name


def test_weights_come_half_a_ring_at_a_time(of_sm90) -> None:
    """All loads that cross a loop's end share one counter, and a product waits for it to be zero: a load in every
    stage would be waited for in the next one, however far ahead it was."""
    if not of_sm90:
        pytest.skip("msp._cuda is not built for sm_90a")
    for kernel in of_sm90:
        told = "".join(
            "p" if opcode.startswith("HGMMA") else "l"
            for opcode in kernel.sequence
            if opcode.startswith("HGMMA") or {"LDG", "128"} <= set(opcode.split("."))
        )
        # before the first product and between the two halves of the ring: four blocks, of two times 16 bytes
        assert told.startswith("l" * 8 + "pp" + "l" * 8 + "p" * 8 + "l" * 8 + "p" * 6), (kernel.name, told)


def test_wgmma_reads_register_operands(cuda_kernels) -> None:
    """``HGMMA.SP.64x256x32.F32.BF16 R24, R176, gdesc[UR16], R24, R152, 0x0``: A is a register, not a descriptor."""
    module = cubins.cuda_module()
    assert module is not None
    lines = [line.split("HGMMA.SP", 1)[1] for line in cubins.dump("sass", module).splitlines() if "HGMMA.SP" in line]
    if not lines:
        pytest.skip("msp._cuda is not built for sm_90a")
    for line in lines:
        _, accumulator, weight = line.replace(",", " ").split()[:3]
        assert accumulator.startswith("R") and weight.startswith("R"), line
