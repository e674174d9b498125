"""Every Triton kernel compiles for real GPUs, on a machine without one."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import msp.triton_kernels

NOT_OPS = {"groups", "targets"}


@pytest.fixture(scope="module")
def compiled():
    """What ``msp.triton_kernels.targets`` prints; in a process of its own, where Triton is no interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "msp.triton_kernels.targets"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_op_is_compiled_for_every_architecture(compiled):
    ops = {module.name for module in pkgutil.iter_modules(msp.triton_kernels.__path__)} - NOT_OPS
    assert {(case["op"], case["architecture"]) for case in compiled} == {
        (op, architecture) for op in ops for architecture in (80, 90, 100)
    }


def test_every_case_gives_a_cubin(compiled):
    assert all(case["cubin_bytes"] > 1000 for case in compiled)


def test_no_kernel_spills_registers(compiled):
    if compiled[0]["registers"] is None:
        pytest.skip("this Triton brings no cuobjdump")
    assert [case for case in compiled if case["local_bytes"]] == []
    assert all(0 < case["registers"] <= 255 for case in compiled)


def test_selection_and_ranking_stay_in_registers(compiled):
    """No shared memory: a group never leaves its thread."""
    cases = [case for case in compiled if case["op"] in ("nm_select", "nm_rank")]
    assert cases and [case for case in cases if case["shared_bytes"]] == []
