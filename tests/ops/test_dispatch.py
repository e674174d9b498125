from __future__ import annotations

import importlib
import re
import sys
import sysconfig
import threading
import types
import warnings

import pytest
import torch

import msp
from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.ops import _compiled, _dispatch, available_backends, check_environment, force_backend, last_backend, nm_select
from msp.ops._dispatch import Op

# of a compiled module for this Python
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("MSP_BACKEND", raising=False)


@pytest.fixture
def make_op():
    """Ops under names of their own, which answer with the backend that served; forgotten afterwards."""
    made = []

    def make(*backends, **options):
        op = Op(f"toy_{len(made)}", lambda x: "reference")
        made.append(op)
        for name in backends:
            op.register(name, lambda x, name=name: name, available=lambda: True, **options)
        return op

    yield make
    for op in made:
        del _dispatch._ops[op.name]


CPU = torch.zeros(1)
META = torch.zeros(1, device="meta")


def chosen(op, device_type):
    """The automatic choice for a device this machine need not have."""
    return op._choose(device_type, (CPU,), {})


def test_prefers_the_native_backend_of_the_device(make_op):
    op = make_op("cuda", "cpu", "triton")
    assert chosen(op, "cuda") == "cuda"
    assert chosen(op, "cpu") == "cpu"
    assert chosen(op, "xpu") == "triton"
    assert chosen(op, "meta") == "reference"
    assert chosen(make_op("triton"), "cuda") == "triton"
    assert chosen(make_op("triton"), "cpu") == "reference"
    assert op.available() == ("cuda", "cpu", "triton", "reference")


def test_passes_over_what_is_not_available_or_declines(make_op):
    op = make_op("triton", supports=lambda x: False)
    op.register("cuda", lambda x: "cuda", available=lambda: False)
    assert chosen(op, "cuda") == "reference"
    assert op.available() == ("triton", "reference")
    with force_backend("cuda"), pytest.raises(UsageError, match="lacks it; available: triton, reference"):
        chosen(op, "cuda")
    with force_backend("triton"), pytest.raises(UsageError, match="does not support these arguments"):
        chosen(op, "cuda")


def test_chooses_by_the_first_tensor_wherever_it_stands(make_op):
    op = make_op("cpu")
    assert op(CPU) == "cpu"
    assert op(x=META) == "reference"


def test_reports_what_served_last(make_op):
    op = make_op("cpu")
    assert last_backend(op.name) is None
    op(CPU)
    assert last_backend(op.name) == "cpu"
    with force_backend("reference"):
        op(CPU)
    assert last_backend(op.name) == "reference"


def test_a_failed_call_is_not_reported(make_op):
    op = make_op()

    def fails(x):
        raise ZeroDivisionError

    op(CPU)
    op.register("cpu", fails, available=lambda: True)
    with pytest.raises(ZeroDivisionError):
        op(CPU)
    assert last_backend(op.name) == "reference"


def test_forcing_nests_and_ends(make_op):
    op = make_op("cpu")
    with force_backend("reference"):
        assert op(CPU) == "reference"
        with force_backend("cpu"):
            assert op(CPU) == "cpu"
        with force_backend(None):
            assert op(CPU) == "reference"
        assert op(CPU) == "reference"
    assert op(CPU) == "cpu"
    with pytest.raises(KeyError), force_backend("reference"):
        raise KeyError
    assert op(CPU) == "cpu"


def test_the_environment_forces_and_the_context_wins(make_op, monkeypatch):
    op = make_op("cpu")
    monkeypatch.setenv("MSP_BACKEND", " Reference ")
    assert op(CPU) == "reference"
    with force_backend("cpu"):
        assert op(CPU) == "cpu"
    for automatic in ("", "auto"):
        monkeypatch.setenv("MSP_BACKEND", automatic)
        assert op(CPU) == "cpu"
    monkeypatch.setenv("MSP_BACKEND", "cuda")
    with pytest.raises(UsageError, match=f"{op.name}: backend 'cuda' was forced, but it has no such implementation"):
        op(CPU)
    monkeypatch.setenv("MSP_BACKEND", "fortran")
    with pytest.raises(UsageError, match="MSP_BACKEND=fortran is not one of cuda, cpu, triton, reference"):
        op(CPU)


def test_a_forced_backend_must_be_able_to_read_the_device(make_op, monkeypatch):
    op = make_op("cuda", "triton")
    with force_backend("cuda"), pytest.raises(UsageError, match="it cannot serve tensors on cpu"):
        op(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with force_backend("triton"), pytest.raises(UsageError, match="it cannot serve tensors on cpu"):
        op(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with force_backend("triton"):
        assert op(CPU) == "triton"


def test_threads_do_not_see_each_other(make_op):
    op = make_op("cpu")
    inside, done = threading.Event(), threading.Event()
    seen = {}

    def other():
        with force_backend("reference"):
            inside.set()
            done.wait(10)
            seen["result"] = op(CPU)
        seen["last"] = last_backend(op.name)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert op(CPU) == "cpu"
    done.set()
    thread.join(10)
    assert seen == {"result": "reference", "last": "reference"}
    assert last_backend(op.name) == "cpu"


def test_unknown_names_are_usage_errors(make_op):
    with pytest.raises(UsageError, match="backend 'tritno' is not one of cuda, cpu, triton, reference"):
        force_backend("tritno").__enter__()
    with pytest.raises(UsageError, match="backend 'metal'"):
        make_op().register("metal", lambda x: x)
    for ask in (last_backend, available_backends):
        with pytest.raises(UsageError, match=r"op 'nm_selekt' is not one of .*nm_select"):
            ask("nm_selekt")


@pytest.mark.parametrize(
    "op",
    ["nm_select", "nm_rank", "nm_keep", "nm_unpack", "nm_linear", "fisher_diag_", "fisher_trace", "obs_prune"],
)
def test_every_op_has_a_reference(op):
    assert available_backends(op)[-1] == "reference"


@pytest.fixture
def compiled(monkeypatch):
    """Installs a stand-in for ``msp._cpu`` or another, or its absence."""

    def install(module, name="msp._cpu"):
        # None makes the import fail, as on a machine without it
        monkeypatch.setitem(sys.modules, name, module)
        _compiled.compiled_module.cache_clear()
        if module is None:
            monkeypatch.setattr(_compiled, "module_files", lambda name: [])
            monkeypatch.delenv("MSP_REQUIRE", raising=False)

    yield install
    monkeypatch.undo()
    _compiled.compiled_module.cache_clear()


def test_works_without_the_compiled_module(compiled):
    compiled(None)
    assert "cpu" not in available_backends("nm_select")
    nm_select(torch.randn(2, 8), NMPattern(2, 8))
    assert last_backend("nm_select") == "reference"
    with (
        force_backend("cpu"),
        pytest.raises(UsageError, match="nm_select: backend 'cpu' was forced, but this machine"),
    ):
        nm_select(torch.randn(2, 8), NMPattern(2, 8))


def test_a_compiled_module_without_the_op_does_not_serve_it(compiled):
    compiled(types.ModuleType("msp._cpu"))
    assert "cpu" not in available_backends("nm_select")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Makes ``msp._cpu`` a file that no Python can import, or no file at all; gives its path."""

    def install(suffix=SUFFIX):
        file = tmp_path / f"_cpu{suffix}"
        file.write_bytes(b"not a shared library")
        monkeypatch.delitem(sys.modules, "msp._cpu", raising=False)
        monkeypatch.delattr(msp, "_cpu", raising=False)
        monkeypatch.setattr(msp, "__path__", [str(tmp_path)])
        # an editable installation has a finder of its own, which knows where the real one lies
        others = [
            finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")
        ]
        monkeypatch.setattr(sys, "meta_path", others)
        importlib.invalidate_caches()
        _compiled.compiled_module.cache_clear()
        return file

    monkeypatch.delenv("MSP_REQUIRE", raising=False)
    yield install
    monkeypatch.undo()
    _compiled.compiled_module.cache_clear()


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        (SUFFIX, "ImportError: .*(file too short|invalid ELF header)"),
        (".cpython-31-x86_64-linux-gnu.so", "ModuleNotFoundError: No module named 'msp._cpu'"),
    ],
    ids=["damaged", "of another Python"],
)
def test_a_module_that_does_not_import_is_told_of_once(suffix, reason, broken):
    file = broken(suffix)
    with pytest.warns(UserWarning, match=f"msp._cpu is there but does not import.*{re.escape(str(file))}: {reason}"):
        assert _compiled.compiled_module("msp._cpu") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "cpu" not in available_backends("nm_select")
        nm_select(torch.randn(2, 8), NMPattern(2, 8))
    assert last_backend("nm_select") == "reference"


def test_a_module_that_is_not_installed_is_no_cause_for_a_warning(broken):
    broken().unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _compiled.compiled_module("msp._cpu") is None


@pytest.mark.parametrize("there", [True, False])
def test_a_required_module_that_does_not_import_is_an_error(there, broken, monkeypatch):
    file = broken()
    if not there:
        file.unlink()
    found = f"{re.escape(str(file))} does not import: ImportError: " if there else "no such file is installed"
    monkeypatch.setenv("MSP_REQUIRE", " CPU")
    for call in (lambda: _compiled.compiled_module("msp._cpu"), lambda: check_environment("cpu")):
        with pytest.raises(MspError, match=f"MSP_REQUIRE asks for the compiled module msp._cpu, but {found}"):
            call()


def test_modules_that_are_required_and_import_are_fine(compiled, monkeypatch):
    for name in ("msp._cpu", "msp._cuda"):
        module = types.ModuleType(name)
        module.isa = lambda: "scalar"
        compiled(module, name)
    monkeypatch.setenv("MSP_REQUIRE", "cpu,cuda")
    check_environment("cpu")


def test_only_modules_that_are_known_can_be_required(monkeypatch):
    monkeypatch.setenv("MSP_REQUIRE", "cpu,gpu")
    with pytest.raises(UsageError, match="MSP_REQUIRE names gpu, but knows cpu, cuda only"):
        check_environment("cpu")


@pytest.mark.parametrize("usable", [True, False])
def test_cuda_kernels_serve_where_the_driver_is_new_enough_for_them(usable, compiled, monkeypatch):
    module = types.ModuleType("msp._cuda")
    module.nm_select = module.obs_prune_block = None
    module.usable = lambda: usable
    compiled(module, "msp._cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for op in ("nm_select", "obs_prune"):
        assert ("cuda" in available_backends(op)) == usable
    assert "cuda" not in available_backends("nm_rank")  # which this module lacks


def test_nm_select_calls_its_binding_as_agreed(compiled):
    calls = []
    module = types.ModuleType("msp._cpu")
    module.nm_select = lambda **arguments: calls.append(arguments)
    compiled(module)
    weight = torch.randn(3, 16).bfloat16()
    scale, row_term, column_term = torch.rand(16), torch.rand(3), torch.rand(16)
    matrix = torch.rand(3, 16)
    cases = [
        ({}, 0, (0, 0, 0, 0)),
        ({"column_scale": scale}, 1, (scale.data_ptr(), 0, 0, 0)),
        ({"row_term": row_term, "column_term": column_term}, 2, (0, row_term.data_ptr(), column_term.data_ptr(), 0)),
        ({"importance": matrix}, 3, (0, 0, 0, matrix.data_ptr())),
        ({"scores": matrix}, 4, (0, 0, 0, matrix.data_ptr())),
    ]
    for terms, kind, pointers in cases:
        packed = nm_select(weight, NMPattern(3, 8), **terms, compliant=True)
        names = ("column_scale_ptr", "row_term_ptr", "column_term_ptr", "matrix_ptr")
        assert calls.pop() == {
            "weight_ptr": weight.data_ptr(),
            "dtype_code": 2,
            "rows": 3,
            "columns": 16,
            "group_size": 8,
            "n": 3,
            "compliant": True,
            "score_kind": kind,
            **dict(zip(names, pointers, strict=True)),
            "values_ptr": packed.values.data_ptr(),
            "bitmask_ptr": packed.bitmask.data_ptr(),
            "threads": torch.get_num_threads(),
        }
    # up to 2 of a group no selection can break the rule, so the walk is not asked for
    nm_select(weight, NMPattern(2, 8), compliant=True)
    assert calls.pop()["compliant"] is False
    for dtype, code in ((torch.float32, 0), (torch.float16, 1)):
        nm_select(weight.to(dtype), NMPattern(2, 8))
        assert calls.pop()["dtype_code"] == code


def test_a_forced_backend_is_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSP_BACKEND", raising=False)
    check_environment("cpu")
    monkeypatch.setenv("MSP_BACKEND", "reference")
    check_environment("cuda")
    monkeypatch.setenv("MSP_BACKEND", "fortran")
    with pytest.raises(UsageError, match="MSP_BACKEND=fortran is not one of cuda, cpu, triton, reference"):
        check_environment("cpu")
    monkeypatch.setenv("MSP_BACKEND", "cuda")
    with pytest.raises(UsageError, match="MSP_BACKEND=cuda cannot serve tensors on cpu"):
        check_environment("cpu")
    monkeypatch.setattr(_dispatch, "_ops", {})
    with pytest.raises(UsageError, match="MSP_BACKEND=cuda was asked for, but this machine or installation lacks it"):
        check_environment("cuda")


def test_a_forced_instruction_set_is_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("msp._cpu", reason="the compiled module msp._cpu is not built")
    monkeypatch.setenv("MSP_ISA", "scalar")
    check_environment("cpu")
    monkeypatch.setenv("MSP_ISA", "mmx")
    check_environment("cuda")
    with pytest.raises(
        UsageError, match=r"MSP_ISA=mmx .*available: .*scalar \(of amx, avx512bf16, avx512, avx2, scalar\)"
    ):
        check_environment("cpu")
