"""Every op and backend on whatever device there is: fresh random inputs, poisoned outputs, two runs bit-equal."""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from cases import Case, every_case

import msp.ops
from msp.ops import _compiled, _dispatch, available_backends, force_backend, last_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ON_GPU = torch.cuda.is_available()
# Another one each time, recorded beside each result; MSP_TEST_SEED makes a run again.
SEED = int(os.environ.get("MSP_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
CASES = [case for case in every_case() if ON_GPU or not case.large]


def backends(op: str) -> list[str]:
    """Those of this device; on a CPU without the reference, which the other tests there run enough."""
    serving = ("cuda", "triton", "reference") if ON_GPU else ("cpu", "triton")
    return [name for name in available_backends(op) if name in serving]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(case, name, id=f"{case.op}-{name}-{case.name}") for case in CASES for name in backends(case.op)],
)
def test_computes_what_it_should_twice(case: Case, backend: str, device, record_property) -> None:
    if backend == "triton" and not ON_GPU and case.dtype == torch.bfloat16 and case.op.startswith("fisher"):
        pytest.skip("tl.dot on bfloat16 is wrong in Triton's interpreter")
    seed = SEED ^ zlib.crc32(f"{case.op} {case.name}".encode())
    record_property("seed", SEED)
    print(f"MSP_TEST_SEED={SEED}")
    prepared = case.prepare(torch.Generator().manual_seed(seed), case.dtype, device)
    try:
        with force_backend(backend):
            first, second = prepared.run(), prepared.run()
    except Exception as error:
        if "does not support these arguments" in str(error):
            pytest.skip(str(error))
        raise
    assert last_backend(case.op) == backend
    prepared.check(first)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def test_every_op_has_cases() -> None:
    public = {name for name in msp.ops.__all__ if name in _dispatch._ops}
    assert len(public) > 5 and public <= {case.op for case in CASES}


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_every_kernel_there_is_can_run(op: str) -> None:
    # sparse tensor cores are beyond Triton
    assert "triton" in available_backends(op) or op == "nm_spmm"
    assert _compiled.compiled_module("msp._cuda") is not None, "msp._cuda is not built"
    if "cuda" in _dispatch._ops[op]._backends:
        assert "cuda" in available_backends(op)
