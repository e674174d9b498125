"""The C++ kernels of nm_linear by address, on every instruction set this machine has."""

from __future__ import annotations

import ctypes
import mmap
import threading

import pytest
import torch
import torch.nn.functional as F
from isas import every_linear_path

from msp.formats.packed_weight import VALUE_DTYPES
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, force_backend, nm_linear, nm_select
from msp.ops.linear import rows as rows_file
from msp.ops.linear.compiled import make_struct

native = pytest.importorskip("msp._cpu", reason="the compiled module msp._cpu is not built")

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def pack(rows: int, columns: int, n: int, m: int, dtype: torch.dtype) -> PackedWeight:
    return nm_select(torch.randn(rows, columns, dtype=dtype), NMPattern(n, m))


def packed_rows(packed):
    return make_struct(
        native.PackedRows, packed.values, packed.bitmask, packed.pattern.n, packed.pattern.m, packed.shape[1]
    )


def run(x, packed, bias=None, *, threads=1):
    """The kernel's product, into memory full of NaN."""
    y = torch.full((len(x), packed.shape[0]), float("nan"), dtype=x.dtype)
    offset = 0 if bias is None else bias.data_ptr()
    native.nm_linear(packed_rows(packed), x.data_ptr(), offset, y.data_ptr(), len(x), threads)
    return y


def unpacked(packed, *, threads=1):
    dense = torch.full(packed.shape, float("nan"), dtype=packed.dtype)
    native.nm_unpack(packed_rows(packed), dense.data_ptr(), threads)
    return dense


def assert_product(y, x, packed, bias=None):
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.T.abs() + (0 if bias is None else bias.double().abs())
    bound = ROUNDING[x.dtype] * expected.abs() + 64 * ROUNDING[torch.float32] * size + 1e-6
    assert ((y.double() - expected).abs() <= bound).all()


@every_linear_path
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_reads_nothing_past_the_end(isa: str, dtype: torch.dtype, fenced) -> None:
    """Every array ends where the memory of the process does: one byte more would be a crash."""
    for n, m in ((1, 4), (3, 8), (2, 16), (31, 32), (5, 32)):
        for rows, groups, tokens in ((1, 1, 1), (3, 5, 2), (17, 9, 5), (16, 32, 16), (7, 13, 67)):
            packed = pack(rows, groups * m, n, m, dtype)
            values, bitmask = fenced(packed.values), fenced(packed.bitmask)
            ended = PackedWeight(values, bitmask, packed.pattern, packed.shape)
            x, bias = fenced(torch.randn(tokens, groups * m, dtype=dtype)), fenced(torch.randn(rows, dtype=dtype))
            assert_product(run(x, ended, bias), x, packed, bias)
            assert torch.equal(unpacked(ended), packed.unpack())


@pytest.fixture
def fenced():
    """Copies of tensors that end at a page nobody may touch."""
    libc = ctypes.CDLL(None, use_errno=True)
    page, held = mmap.PAGESIZE, []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.nbytes
        total = -(-size // page) * page
        area = mmap.mmap(-1, total + page)
        held.append(area)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert libc.mprotect(ctypes.c_void_p(start + total), ctypes.c_size_t(page), 0) == 0
        flat = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=total - size)
        fenced = flat.view(tensor.dtype).view(tensor.shape)
        return fenced.copy_(tensor)

    return copy


@every_linear_path
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_threads_and_neighbours_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    packed = pack(300, 1032, 3, 8, dtype)
    for tokens in (1, 4, 20, 83):
        x = torch.randn(tokens, 1032, dtype=dtype)
        alone = run(x, packed)
        assert_product(alone, x, packed)
        for threads in range(2, 9):
            assert torch.equal(run(x, packed, threads=threads), alone)
            assert torch.equal(unpacked(packed, threads=threads), packed.unpack())


@every_linear_path
@pytest.mark.parametrize("tokens", [5, 67])
def test_addresses_need_no_alignment_beyond_the_element(isa: str, tokens: int) -> None:
    for dtype in VALUE_DTYPES:
        packed = pack(21, 136, 2, 8, dtype)
        moved = []
        x, bias = torch.randn(tokens, 136, dtype=dtype), torch.randn(21, dtype=dtype)
        for tensor in (packed.values, packed.bitmask, x, bias):
            room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            moved.append(room[1:].view(tensor.shape).copy_(tensor))
        values, bitmask, x, bias = moved
        shifted = PackedWeight(values, bitmask, packed.pattern, packed.shape)
        assert_product(run(x, shifted, bias), x, packed, bias)
        assert torch.equal(unpacked(shifted), packed.unpack())


@every_linear_path
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_rounded_to_the_nearest_even_once(isa: str, dtype: torch.dtype) -> None:
    """One weight of 1 a row: y is the fp32 sum x + bias, rounded as torch rounds it; extremes included."""
    x = torch.cat([torch.randn(400) * 10.0 ** torch.randint(-9, 9, (400,)), torch.tensor([0.0, -0.0, 65504.0, 3e38])])
    x = x.to(dtype)[:, None].expand(-1, 8).contiguous()
    packed = PackedWeight(
        torch.ones(1, 1, dtype=dtype), torch.tensor([[1]], dtype=torch.uint8), NMPattern(1, 8), (1, 8)
    )
    bias = torch.tensor([3.1e-3], dtype=dtype)
    finite = x[:, 0].isfinite()
    y = run(x[finite], packed, bias)[:, 0]
    assert torch.equal(y, (x[finite, 0].float() + bias.float()).to(dtype))


@every_linear_path
def test_infinities_and_nan_of_tokens_come_through(isa: str) -> None:
    packed = pack(3, 32, 32, 32, torch.float32)
    packed.values.abs_()
    for dtype in VALUE_DTYPES:
        x = torch.zeros(43, 32)
        x[0, 3], x[1, 4] = float("inf"), float("nan")
        y = run(x.to(dtype), packed.to(dtype=dtype))
        assert (y[0] == float("inf")).all() and y[1].isnan().all() and (y[2:] == 0).all()


@every_linear_path
@pytest.mark.parametrize("tokens", [6, 70])
def test_many_threads_of_python_at_once(isa: str, tokens: int) -> None:
    packed = pack(200, 512, 2, 8, torch.bfloat16)
    x = torch.randn(tokens, 512, dtype=torch.bfloat16)
    want = run(x, packed)
    wrong = []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(run(x, packed, threads=2), want):
                wrong.append("product")
            if not torch.equal(unpacked(packed, threads=2), packed.unpack()):
                wrong.append("dense")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_linear_path
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [16, 17, 1030])
def test_the_op_serves_any_number_of_tokens(isa: str, tokens: int, dtype: torch.dtype, monkeypatch) -> None:
    """Also by rows unpacked for torch, here in parts of fewer than there are."""
    monkeypatch.setattr(rows_file, "UNPACKED_BYTES", 5000)
    packed = pack(37, 168, 3, 8, dtype)
    x, bias = torch.randn(tokens, 168, dtype=dtype), torch.randn(37, dtype=dtype)
    with force_backend("cpu"):
        torch.testing.assert_close(nm_linear(x, packed, bias), F.linear(x, packed.unpack(), bias))
        torch.testing.assert_close(nm_linear(x, packed), F.linear(x, packed.unpack()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype_code": 3}, "dtype_code 3"),
        ({"group_size": 6}, "group_size 6"),
        ({"n": 9}, "n 9 is outside 0 ... 8"),
        ({"columns": 12}, "12 columns are not a multiple of group_size 8"),
        ({"tokens": -1}, "-1 tokens"),
        ({"values_ptr": 0}, "values_ptr is null"),
        ({"y_ptr": 3}, "y_ptr is not a multiple of 4"),
    ],
)
def test_wrong_arguments_are_refused(change, message) -> None:
    weight = {"values_ptr": 64, "bitmask_ptr": 64, "dtype_code": 0, "rows": 1, "columns": 8, "group_size": 8, "n": 2}
    call = {"x_ptr": 64, "bias_ptr": 0, "y_ptr": 64, "tokens": 1, "threads": 1}
    changed = [{name: change.get(name, value) for name, value in given.items()} for given in (weight, call)]
    with pytest.raises(ValueError, match=message):
        native.nm_linear(native.PackedRows(**changed[0]), **changed[1])
