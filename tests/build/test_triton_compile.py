"""Every Triton kernel compiles for real GPUs, on a machine without one."""

from __future__ import annotations

import pkgutil

import pytest

pytest.importorskip("triton")

import kernel_table
import msp.triton_kernels

NOT_OPS = {"gradients", "groups", "targets"}


def test_every_op_is_compiled_for_every_architecture(triton_cases):
    ops = {module.name for module in pkgutil.iter_modules(msp.triton_kernels.__path__)} - NOT_OPS
    assert {(case["op"], case["architecture"]) for case in triton_cases} == {
        (op, architecture) for op in ops for architecture in (80, 90, 100)
    }


def test_every_case_gives_a_cubin(triton_cases):
    assert all(case["cubin_bytes"] > 1000 for case in triton_cases)


def test_no_kernel_spills_registers(triton_cases):
    if triton_cases[0]["registers"] is None:
        pytest.skip("this Triton brings no cuobjdump")
    assert [case for case in triton_cases if case["local_bytes"]] == []
    assert all(0 < case["registers"] <= 255 for case in triton_cases)


def test_selection_and_ranking_stay_in_registers(triton_cases):
    """No shared memory: a group never leaves its thread."""
    cases = [case for case in triton_cases if case["op"] in ("nm_select", "nm_rank")]
    assert cases and [case for case in cases if case["shared_bytes"]] == []


@pytest.fixture(scope="module")
def amd_cases():
    """One case of each kernel, compiled for gfx942."""
    from triton.backends import backends

    if "amd" not in backends:
        pytest.skip("this Triton brings no backend for AMD")
    return kernel_table.compile_triton("--amd")


def test_every_kernel_compiles_for_amd(amd_cases, triton_cases):
    compiled = {(case["op"], case["kernel"]) for case in amd_cases if "skipped" not in case}
    assert compiled == {(case["op"], case["kernel"]) for case in triton_cases}
    for case in amd_cases:
        if "skipped" in case:
            assert case["name"].endswith("tma") and "tensor descriptors" in case["skipped"], case
        else:
            assert case["target"] == "gfx942" and case["hsaco_bytes"] > 1000, case


def test_what_is_compiled_for_amd_fits_a_compute_unit(amd_cases):
    """64 KiB of shared memory, 1024 threads a block; vector registers stay where they are."""
    for case in amd_cases:
        if "skipped" not in case:
            assert case["shared_bytes"] <= 64 << 10 and case["threads"] <= 1024, case
            assert case["spilled_registers"] == case["local_bytes"] == 0, case
