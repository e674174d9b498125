"""Every op and backend on whatever device there is: fresh random inputs, poisoned outputs, two runs bit-equal."""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from cases import Case, backends_of, every_case

import msp.ops
from msp.ops import _compiled, _dispatch, available_backends, force_backend, last_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ON_GPU = torch.cuda.is_available()
# Another one each time, recorded beside each result; MSP_TEST_SEED makes a run again.
SEED = int(os.environ.get("MSP_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
CASES = [case for case in every_case() if ON_GPU or not case.large]


def backends(kernels: str) -> list[str]:
    """Those of this device; on a CPU without the reference, which the other tests there run enough."""
    serving = ("cuda", "triton", "reference") if ON_GPU else ("cpu", "triton")
    return [name for name in backends_of(kernels) if name in serving]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, name, id=f"{case.kernels}-{name}-{case.name}")
        for case in CASES
        for name in backends(case.kernels)
    ],
)
def test_computes_what_it_should_twice(case: Case, backend: str, device, record_property) -> None:
    if backend == "triton" and not ON_GPU and case.dtype == torch.bfloat16 and case.op.startswith("fisher"):
        pytest.skip("tl.dot on bfloat16 is wrong in Triton's interpreter")
    seed = SEED ^ zlib.crc32(f"{case.kernels} {case.name}".encode())
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
@pytest.mark.parametrize("kernels", sorted({case.kernels for case in CASES}))
def test_every_kernel_there_is_can_run(kernels: str) -> None:
    op, _, form = kernels.partition(".")
    available, of = backends_of(kernels), _dispatch._ops[op]
    # sparse tensor cores are beyond Triton
    assert "triton" in available or form == "fragments"
    assert _compiled.compiled_module("msp._cuda") is not None, "msp._cuda is not built"
    if "cuda" in (of.forms[form] if form else of)._backends:
        assert "cuda" in available
    assert set(available) <= set(available_backends(op))


def test_every_form_of_a_weight_has_cases() -> None:
    forms = {f"{name}.{form}" for name, op in _dispatch._ops.items() for form in op.forms}
    assert "nm_linear.tiles" in forms and forms <= {case.kernels for case in CASES}
