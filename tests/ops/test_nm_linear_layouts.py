"""``nm_linear`` is one op: a name, a last backend, and layouts that all multiply alike."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
import subprocess
import sys

import pytest
import torch
from oracles import assert_product

import msp.ops
import msp.ops.linear
from msp.errors import UsageError
from msp.formats.patterns import NMPattern
from msp.ops import _dispatch, available_backends, force_backend, last_backend, nm_linear, nm_select
from msp.ops.linear import DENSE, FRAGMENTS, LAYOUTS, ROWS, TILES, Layout, Size
from msp.ops.linear.thresholds import ANY_NUMBER, FEW_TOKENS, FEW_TOKENS_ELSEWHERE, few_tokens

# fragments are made by a kernel: tests/ops/test_nm_spmm.py
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["2:8", "5:8", "3:16", "2:4"])
def test_every_layout_multiplies_and_comes_back_to_the_bit(layout: Layout, pattern, dtype, device):
    packed = nm_select(torch.randn(32, 512, device=device).to(dtype), pattern)
    bias = torch.randn(32, device=device).to(dtype)
    parts = layout.arrange(packed.values, packed.bitmask, packed.pattern, 512)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 512, device=device).to(dtype)
        y = layout.product(x, *parts, bias, packed.pattern, 512, packed.pattern.always_compliant)
        assert_product(y, x, packed, bias)
        assert_product(nm_linear(x, packed, bias), x, packed, bias)
    values, bitmask = layout.restore(*parts, packed.pattern, 512)
    assert torch.equal(values, packed.values) and torch.equal(bitmask, packed.bitmask)


def test_every_layout_says_by_one_name_who_served():
    packed = nm_select(torch.randn(16, 256).bfloat16(), "2:8")
    x = torch.randn(2, 256).bfloat16()
    served = {ROWS: {"cpu", "reference"} & set(available_backends("nm_linear")), TILES: {"reference"}}
    for layout, backends in served.items():
        parts = layout.arrange(packed.values, packed.bitmask, packed.pattern, 256)
        for backend in backends:
            nm_linear(x.float(), nm_select(torch.randn(4, 256), "2:8"))  # something else served last
            with force_backend(backend):
                layout.product(x, *parts, None, packed.pattern, 256)
            assert last_backend("nm_linear") == backend
    parts = TILES.arrange(packed.values, packed.bitmask, packed.pattern, 256)
    # plain torch: a weight that is held dense, one without values, and an input without tokens
    empty, dense = nm_select(torch.randn(4, 256), "0:8"), DENSE.arrange(*parts, packed.pattern, 256)
    for plain in (
        lambda: DENSE.product(x, *dense, None, packed.pattern, 256),
        lambda: nm_linear(x.float(), empty),
        lambda: nm_linear(x[:0], packed),
    ):
        _dispatch._ops["nm_linear"].note("cpu")
        plain()
        assert last_backend("nm_linear") == "reference"
    with force_backend("cpu"), pytest.raises(UsageError, match="nm_linear of a weight in tiles: backend 'cpu' was"):
        TILES.product(x, *parts, None, packed.pattern, 256)


@pytest.mark.parametrize("old", ["nm_linear_tiles", "nm_linear_group", "nm_spmm"])
def test_no_layout_has_a_name_of_its_own(old):
    assert old not in _dispatch._ops and not hasattr(msp.ops, old)
    for ask in (available_backends, last_backend):
        with pytest.raises(UsageError, match=f"op '{old}' is not one of"):
            ask(old)


def test_backends_of_all_layouts_are_counted(monkeypatch):
    op = _dispatch._ops["nm_linear"]
    assert set(op.forms) == {"tiles", "group", "fragments"}
    assert all("cuda" in of._backends for of in (op, *op.forms.values()))
    # one that only weights in another form have is among them as well
    monkeypatch.setattr(op, "_backends", {"reference": op._backends["reference"]})
    monkeypatch.setattr(op.forms["tiles"], "available", lambda: ("triton", "reference"))
    assert op.available() == ("reference",) and available_backends("nm_linear") == ("triton", "reference")


def test_the_name_stays_a_function():
    """Whatever file of the package is imported first, and by whatever way."""
    names = [f"msp.ops.linear.{module.name}" for module in pkgutil.iter_modules(msp.ops.linear.__path__)]
    assert "msp.ops.linear.tiles" in names
    for name in names:
        importlib.import_module(name)
    assert callable(msp.ops.nm_linear) and msp.ops.nm_linear is nm_linear
    code = "import msp.ops.linear.op as file; import msp.ops; assert msp.ops.nm_linear is file.nm_linear"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layouts_are_values():
    for layout in (DENSE, TILES, ROWS, FRAGMENTS):
        assert copy.deepcopy(layout) == layout == pickle.loads(pickle.dumps(layout))
        assert all(layout != other for other in (DENSE, TILES, ROWS, FRAGMENTS) if other is not layout)


def test_a_cpu_has_rows_and_a_gpu_what_its_kernels_read(monkeypatch):
    from msp.ops.linear import fragments, tiles

    def chosen(pattern, device, dtype=torch.bfloat16, rows=16):
        size = Size(NMPattern.parse(pattern), rows, 256, dtype, torch.device(device))
        return next(layout for layout in LAYOUTS if layout.serves(size))

    for built in (True, False):
        for file in (tiles, fragments):
            monkeypatch.setattr(file, "cuda_serves", lambda name, built=built: built)
        assert chosen("2:8", "cuda") == (TILES if built else ROWS)
        assert chosen("7:8", "cuda") == DENSE and chosen("0:8", "cuda") == ROWS
        assert chosen("2:8", "cuda", torch.float32) == chosen("2:8", "cuda", rows=8) == ROWS
        assert chosen("2:8", "cpu") == chosen("7:8", "cpu") == ROWS


def test_few_tokens_are_those_of_the_table():
    for (isa, dtype), tokens in FEW_TOKENS.items():
        assert few_tokens(dtype, isa) == tokens
    assert few_tokens(torch.float16, "avx2") == few_tokens(torch.float16, "amx") == FEW_TOKENS_ELSEWHERE
    assert few_tokens(torch.bfloat16, "avx512bf16") == ANY_NUMBER
