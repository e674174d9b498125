"""No kernel runs on a bitmask that was not counted, however it came in; and none is counted twice."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from msp.errors import MspError
from msp.formats import positions as _positions
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, force_backend, nm_linear, nm_select, nm_unpack
from msp.ops.linear import group_op
from msp.ops.linear.rows import inference_op, nm_linear_op
from msp.ops.linear.tile_order import to_tiles
from msp.ops.linear.tiles import tiles_op
from msp.packed.sparse_linear import SparseLinear

COLUMNS, ROWS = 64, 16


def module(pattern: str = "1:8") -> SparseLinear:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return SparseLinear.from_packed(nm_select(weight, NMPattern.parse(pattern)))


def full(linear: SparseLinear) -> Tensor:
    return torch.full_like(linear.bitmask, 255)


def assign(linear: SparseLinear) -> None:
    linear.bitmask = full(linear)


def swap_data(linear: SparseLinear) -> None:
    linear.bitmask.data = full(linear)


def write(linear: SparseLinear) -> None:
    linear.bitmask.fill_(255)


def write_to_a_view(linear: SparseLinear) -> None:
    linear.bitmask[3, 2:4] = 255


def other_pattern(linear: SparseLinear) -> None:
    linear.pattern = NMPattern(1, 4)  # as many values


def buffer_put(linear: SparseLinear) -> None:
    linear._buffers["bitmask"] = full(linear)


WAYS = [assign, swap_data, write, write_to_a_view, other_pattern, buffer_put]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_comes_in_anew_is_counted(way: Callable[[SparseLinear], None], trained: bool) -> None:
    linear, x = module("2:8"), torch.ones(2, COLUMNS)
    linear(x)
    linear.values.requires_grad_(trained)
    way(linear)
    with pytest.raises(MspError, match="bitmask does not keep"):
        linear(x)


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("also", [(), ("values",)])
def test_a_bitmask_alone_is_not_loaded(also: tuple[str, ...], strict: bool, assigned: bool) -> None:
    linear = module()
    before = linear.bitmask.clone()
    state = {"bitmask": full(linear)} | {name: getattr(linear, name).detach() for name in also}
    with pytest.raises(RuntimeError, match="bitmask does not keep 1 of every 8"):
        linear.load_state_dict(state, strict=strict, assign=assigned)
    assert torch.equal(linear.bitmask, before)
    nn.Sequential(linear)[0](torch.ones(1, COLUMNS))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"values": torch.zeros(ROWS, 9)}, r"values has shape \[16, 9\]"),
        ({"values": torch.zeros(ROWS, 8, dtype=torch.float64)}, "values are torch.float64"),
        ({"bitmask": torch.zeros(ROWS, 8, dtype=torch.int64)}, "bitmask is torch.int64"),
        ({"bitmask": torch.zeros(ROWS, 7, dtype=torch.uint8)}, r"bitmask has shape \[16, 7\]"),
        ({"bitmask": torch.zeros(ROWS, 8, dtype=torch.uint8)}, "does not keep 1 of every 8"),
    ],
)
@pytest.mark.parametrize("assigned", [False, True])
def test_parts_of_other_shapes_and_dtypes_are_not_loaded(
    state: dict[str, Tensor], message: str, assigned: bool
) -> None:
    with pytest.raises(RuntimeError, match=message):
        module().load_state_dict(state, strict=False, assign=assigned)


def test_one_part_that_fits_is_loaded() -> None:
    linear, other = module(), module()
    other.bitmask = other.bitmask.roll(1, 0)
    linear.load_state_dict({"bitmask": other.bitmask}, strict=False)
    assert torch.equal(linear.bitmask, other.bitmask)
    linear.load_state_dict({"values": other.values.detach() * 2}, strict=False)
    assert torch.equal(linear.values, other.values * 2)
    assert linear(torch.ones(1, COLUMNS)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32, torch.bool])
def test_another_dtype_is_refused_at_the_call(dtype: torch.dtype) -> None:
    linear = module()
    linear.bitmask = linear.bitmask.to(dtype)
    with pytest.raises(TypeError, match="bitmask is"):
        linear(torch.ones(1, COLUMNS))


@pytest.mark.parametrize("shape", [(ROWS, 7), (ROWS - 1, 8), (ROWS * 8,), (0, 8)])
def test_another_shape_is_refused_at_the_call(shape: tuple[int, ...]) -> None:
    linear = module()
    linear.bitmask = torch.ones(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bitmask has"):
        linear(torch.ones(1, COLUMNS))
    linear = module()
    linear.values = nn.Parameter(torch.ones(shape), requires_grad=False)
    if shape != (ROWS, 8):
        with pytest.raises(ValueError, match="values have shape"):
            linear(torch.ones(1, COLUMNS))


def test_copies_are_counted_for_themselves() -> None:
    linear, x = module(), torch.randn(3, COLUMNS)
    expected = linear(x)
    linear.bitmask.fill_(255)
    for copied in (copy.deepcopy(linear), through_pickle(linear)):
        with pytest.raises(MspError, match="bitmask"):
            copied(x)
    linear = module()
    for copied in (copy.deepcopy(linear), through_pickle(linear)):
        assert torch.equal(copied(x), expected)


def through_pickle(linear: SparseLinear) -> SparseLinear:
    stream = io.BytesIO()
    torch.save(linear, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert isinstance(loaded, SparseLinear)
    return loaded


def test_memory_that_is_used_again_is_counted_again() -> None:
    x = torch.ones(1, COLUMNS)
    linear = module()
    address = linear.bitmask.data_ptr()
    linear(x)
    linear.bitmask = torch.empty(0, dtype=torch.uint8)
    gc.collect()
    assert (address, "positions") not in _positions._known
    for _ in range(50):  # the allocator gives the same memory again, sooner or later
        linear.bitmask = torch.full((ROWS, COLUMNS // 8), 255, dtype=torch.uint8)
        with pytest.raises(MspError, match="bitmask"):
            linear(x)


def test_each_bitmask_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    count = _positions.count_bits

    def counting(bitmask: Tensor, group_size: int) -> Tensor:
        nonlocal counted
        counted += 1
        return count(bitmask, group_size)

    monkeypatch.setattr(_positions, "count_bits", counting)
    linear, x = module(), torch.ones(1, COLUMNS)
    for _ in range(3):
        linear(x)
        nm_unpack(linear.packed)
        nm_linear(x, linear.packed)
        linear.values.data.mul_(2)
    assert counted == 1
    linear.bitmask.copy_(linear.bitmask.clone())
    linear(x)
    linear(x)
    assert counted == 2


def test_ops_that_are_called_directly_check_their_arguments() -> None:
    x, packed = torch.ones(1, COLUMNS), module().packed
    wrong = torch.full_like(packed.bitmask, 255)
    for op in (nm_linear_op, inference_op):
        with pytest.raises(MspError, match="bitmask"):
            op(x, packed.values, wrong, None, 1, 8, COLUMNS)
        with pytest.raises(ValueError, match="no pattern"):
            op(x, packed.values, packed.bitmask, None, 1, 7, COLUMNS)
    with pytest.raises(MspError, match="bitmask"):
        torch.ops.msp.nm_unpack_(packed.values, wrong, 1, 8, torch.empty(ROWS, COLUMNS))
    with pytest.raises(ValueError, match="out is"):
        torch.ops.msp.nm_unpack_(packed.values, packed.bitmask, 1, 8, torch.empty(ROWS + 1, COLUMNS))
    with pytest.raises(ValueError, match="rank has shape"):
        torch.ops.msp.nm_keep(torch.ones(4, 8), torch.zeros(4, 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="column_scale has shape"):
        torch.ops.msp.nm_select(torch.ones(4, 8), [torch.ones(4), None, None, None, None], 2, 8, False)
    with pytest.raises(ValueError, match="column_scale has shape"):
        torch.ops.msp.nm_rank(torch.ones(4, 8), [torch.ones(4), None, None, None, None], 8)
    with pytest.raises(ValueError, match="hinv_chol has shape"):
        torch.ops.msp.obs_prune(torch.ones(4, 8), torch.ones(4, 4), 2, 8, 8)
    with pytest.raises(ValueError, match="acc has shape"):
        torch.ops.msp.fisher_diag_(torch.zeros(2, 2), torch.ones(1, 3, 8), torch.ones(1, 3, 4))


def test_tiles_are_checked_too() -> None:
    packed = nm_select(torch.randn(16, 256).half(), NMPattern(2, 8))
    values, bitmask = to_tiles(packed.values, packed.bitmask)
    x = torch.randn(1, 256).half()
    wrong = torch.full_like(bitmask, 255)
    tiles_op(x, values, bitmask, None, 2, 8, 256, True)
    with pytest.raises(MspError, match="bitmask"):
        tiles_op(x, values, wrong, None, 2, 8, 256, True)
    with pytest.raises(MspError, match="bitmask"):
        group_op(x, [values, values], [bitmask, wrong], [None, None], [2, 2], [8, 8], 256)
    with pytest.raises(ValueError, match="contiguous"):
        tiles_op(x, values.t().contiguous().t(), bitmask, None, 2, 8, 256, True)
    four = nm_select(torch.randn(16, 256).half(), NMPattern(4, 8))
    values, bitmask = to_tiles(four.values, four.bitmask)
    with pytest.raises(MspError, match="more than 2 of some 4"):
        tiles_op(x, values, bitmask, None, 4, 8, 256, True)


@pytest.mark.parametrize("backend", ["reference", "triton", "cpu"])
def test_strides_of_the_parts_do_not_matter(backend: str) -> None:
    from msp.ops import available_backends

    if backend not in available_backends("nm_linear"):
        pytest.skip(f"{backend} is not here")
    packed, x = module("2:8").packed, torch.randn(2, COLUMNS)
    odd = PackedWeight(
        packed.values.t().contiguous().t(), packed.bitmask.t().contiguous().t(), packed.pattern, packed.shape
    )
    with force_backend(backend):
        assert torch.equal(nm_linear(x, odd), nm_linear(x, packed))
