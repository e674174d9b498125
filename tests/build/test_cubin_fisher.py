"""What Triton made of the Fisher kernels."""

from __future__ import annotations

from pathlib import Path

import cubins
import pytest

# Of one multiprocessor, for one block: CUDA C++ Programming Guide; the least of sm_80, 86 and 89 (120 too)
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def cases(triton_cases):
    if cubins.find_tool("cuobjdump") is None:
        pytest.skip("neither the CUDA toolkit nor Triton brings cuobjdump")
    fisher = [case for case in triton_cases if case["op"].startswith("fisher")]
    return [(case, cubins.read_kernels(Path(case["cubin"]))[0]) for case in fisher]


def test_tensor_cores_multiply_what_has_16_bits(cases) -> None:
    found = {(case["kernel"], case["architecture"]) for case, _ in cases}
    assert len(found) == 3 * 3
    for case, kernel in cases:
        multiplies = bool(kernel.count(TENSOR_CORES[case["architecture"]]))
        assert multiplies == case["name"].startswith("bf16"), (case, kernel)


def test_tiles_arrive_asynchronously(cases) -> None:
    for case, kernel in cases:
        bulk, copies = kernel.count("UTMALDG"), kernel.count("LDGSTS", 128)
        # a descriptor each for x and g, in the loop and before it; or 16 bytes a thread, never through registers
        assert (bulk >= 4 and not copies) if case["name"].endswith("tma") else (copies >= 4 and not bulk), case
        # what is read otherwise is the accumulator
        assert case["op"] == "fisher_diag" or not kernel.count("LDG"), case


def test_they_fit_every_gpu_of_their_row(cases) -> None:
    for case, kernel in cases:
        assert not kernel.spilled, case
        assert case["shared_bytes"] <= SHARED_BYTES[case["architecture"]], case
