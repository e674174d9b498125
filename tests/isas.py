"""A test that asks for ``isa`` runs on every instruction set of this machine; `make sanitize` has this as a plugin."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    native = pytest.importorskip("msp._cpu", reason="the compiled module msp._cpu is not built")
    monkeypatch.setenv("MSP_ISA", request.param)
    try:
        assert native.isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    return str(request.param)


# nm_linear has paths of its own for two more
every_linear_path = pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16", "amx"], indirect=True)
