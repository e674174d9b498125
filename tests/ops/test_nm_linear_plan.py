"""The table by which a CUDA device multiplies, and that every plan of it can be launched."""

from __future__ import annotations

import itertools

import pytest
import torch

from msp.formats.patterns import GROUP_SIZES, NMPattern
from msp.ops import nm_select
from msp.ops.linear.group import MOST, MOST_TOKENS
from msp.ops.linear.plan import (
    FEW_TILES,
    WARPS,
    Device,
    can_expand,
    kept_bytes,
    packed_share,
    plan,
    resident_blocks,
    shared_bytes,
    slower_from_tokens,
    stays_dense,
)
from msp.ops.linear.thresholds import (
    EXPAND_TOKENS,
    EXPAND_TOKENS_BEFORE_DENSE,
    EXPAND_TOKENS_BEFORE_SPMM,
    GATHER_TOKENS,
    SPMM_TOKENS,
)

H200 = Device(132, 228 << 10)
A100 = Device(108, 164 << 10)
RTX_4090 = Device(128, 100 << 10)
SHAPES = [
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (14336, 4096),
    (4096, 14336),
    (1024, 4096),
    (3584, 18944),
    (16, 256),
]
# both sides of every threshold, and of every number of tokens that a kernel takes at once
BOUNDS = (GATHER_TOKENS, EXPAND_TOKENS, EXPAND_TOKENS_BEFORE_SPMM, EXPAND_TOKENS_BEFORE_DENSE, SPMM_TOKENS)
TOKENS = sorted({1, 8192, *(limit + more for limit in (4, 8, 16, 32, *BOUNDS) for more in (0, 1))})
PATTERNS = [NMPattern(n, m) for m in GROUP_SIZES for n in range(1, m)]


@pytest.mark.parametrize("device", [H200, A100, RTX_4090], ids=["H200", "A100", "RTX 4090"])
@pytest.mark.parametrize("kept", [False, True], ids=["nothing kept", "kept"])
@pytest.mark.parametrize("compliant", [False, True], ids=["any", "compliant"])
def test_more_tokens_never_lead_back(device, compliant, kept):
    """What takes less for one token takes more for each further one, so that each way has one range of tokens."""
    for pattern in PATTERNS:
        many = range(1, 2 * SPMM_TOKENS + 1)
        ways = [plan(tokens, 4096, 4096, pattern, compliant, device, kept).how for tokens in many]
        order = [way for way, _ in itertools.groupby(ways)]
        assert order[0] == "gather" and len(set(order)) == len(order), (pattern, order)
        assert can_expand(pattern) or "expand" not in order
        assert compliant or "spmm" not in order
        # what is kept takes the place of unpacking
        assert order[-1] == ("spmm" if compliant else "unpack")
        assert not (kept and compliant) or "unpack" not in order


def test_the_packed_weight_is_read_at_most_as_often_as_the_dense_one_would_cost():
    for pattern, tokens in itertools.product(PATTERNS, range(1, 65)):
        found = plan(tokens, 4096, 4096, pattern, False, H200)
        if found.how == "gather":
            passes = -(-tokens // found.tokens_at_once)
            assert passes == 1 or passes * packed_share(pattern) <= 1, (pattern, tokens)


def test_a_product_is_slower_than_a_dense_one_where_the_packed_weight_is_no_longer_read_as_it_is():
    for pattern in PATTERNS:
        if stays_dense(pattern):
            continue
        first = slower_from_tokens(pattern)
        assert plan(first - 1, 4096, 4096, pattern, False, H200).how in ("gather", "expand"), pattern
        assert can_expand(pattern) or plan(first, 4096, 4096, pattern, False, H200).how == "unpack", pattern


def test_bytes_of_what_is_kept():
    compiled = pytest.importorskip("msp._cuda")
    for rows, columns in [*SHAPES, (144, 1280)]:
        assert kept_bytes(NMPattern(2, 8), rows, columns) == compiled.nm_spmm_fragment_bytes(rows, columns)
        assert kept_bytes(NMPattern(5, 8), rows, columns) == 2 * rows * columns


@pytest.mark.parametrize("device", [H200, A100, RTX_4090], ids=["H200", "A100", "RTX 4090"])
def test_every_plan_fits_the_device(device):
    for (rows, columns), tokens, pattern in itertools.product(SHAPES, TOKENS, PATTERNS[::3]):
        found = plan(tokens, rows, columns, pattern, False, device)
        if found.how not in ("gather", "expand"):
            continue
        assert found.how == "gather" or can_expand(pattern)
        assert 1 <= found.splits <= columns // 256 and found.stripes in (1, 2, 4, 8)
        assert shared_bytes(found.how, found.tokens_at_once, columns, found.splits) <= device.block_shared()


@pytest.mark.parametrize("device", [H200, A100, RTX_4090], ids=["H200", "A100", "RTX 4090"])
def test_blocks_that_are_to_share_a_multiprocessor_fit_it(device):
    for (rows, columns), tokens in itertools.product(SHAPES, TOKENS):
        found = plan(tokens, rows, columns, NMPattern(2, 8), False, device)
        if found.how in ("gather", "expand"):
            blocks = resident_blocks(found.how, found.tokens_at_once, columns, device)
            needed = shared_bytes(found.how, found.tokens_at_once, columns, found.splits)
            assert needed <= device.block_shared(blocks), (rows, columns, tokens)


def test_large_products_fill_every_multiprocessor_twice():
    for rows, columns in SHAPES[:-1]:
        found = plan(16, rows, columns, NMPattern(2, 8), True, H200)
        blocks = -(-rows // (16 * found.stripes)) * found.splits
        # or one split more would leave a warp without a tile
        tiles = columns // 256 * found.stripes
        assert blocks >= 2 * H200.multiprocessors or tiles < (found.splits + 1) * WARPS, (rows, columns)


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_a_block_has_more_to_multiply_than_to_prepare(device):
    """The table, the activations and the sums over warps are made once a block."""
    for (rows, columns), tokens in itertools.product(SHAPES, (8, 16, 32, 192)):
        found = plan(tokens, rows, columns, NMPattern(2, 8), False, device)
        blocks = -(-rows // (16 * found.stripes)) * -(-tokens // found.tokens_at_once)
        if blocks >= 2 * device.multiprocessors:
            assert columns // 256 // found.splits >= min(FEW_TILES, columns // 256), (rows, columns, tokens)


def test_sizes_are_those_of_the_kernels():
    compiled = pytest.importorskip("msp._cuda")
    for how, at_once, columns, splits in itertools.product(
        ("gather", "expand"), (1, 2, 4, 8, 16, 32), (256, 11008), (1, 3)
    ):
        if compiled.nm_linear_has(how, 8, 2, at_once) and splits <= columns // 256:
            cut = compiled.LinearCut(form=how, tokens_at_once=at_once, stripes=1, splits=splits)
            expected = compiled.nm_linear_shared_bytes(columns, cut)
            assert shared_bytes(how, at_once, columns, splits) == expected
    for pattern in PATTERNS:
        if compiled.nm_linear_has("gather", pattern.m, pattern.n, 1):
            assert compiled.nm_linear_has("expand", pattern.m, pattern.n, 8) == can_expand(pattern)


def test_binding_refuses_what_no_kernel_serves():
    compiled = pytest.importorskip("msp._cuda")
    weight = {"values_ptr": 16, "bitmask_ptr": 16, "dtype_code": 2, "rows": 16, "columns": 256}
    weight |= {"group_size": 8, "n": 2}
    cut = {"form": "gather", "tokens_at_once": 1, "stripes": 1, "splits": 1}
    call = {"x_ptr": 16, "bias_ptr": 0, "y_ptr": 16, "partials_ptr": 0, "tokens": 1, "stream": 0}
    for change, message in (
        ({"dtype_code": 0}, "float32"),
        ({"rows": 8}, "not made of tiles"),
        ({"columns": 128}, "not made of tiles"),
        ({"x_ptr": 8}, "x_ptr is not a multiple of 16"),
        ({"y_ptr": 0}, "y_ptr is null"),
        ({"tokens": -1}, "tokens -1 is negative"),
        ({"values_ptr": 0}, "values_ptr is null"),
        ({"tokens_at_once": 3}, "gather has no kernel for 2:8 and 3 tokens"),
        ({"form": "scatter"}, "form 'scatter' is not one of gather, expand"),
        ({"form": "expand", "tokens_at_once": 8, "group_size": 16, "n": 5}, "expand has no kernel for 5:16"),
        ({"group_size": 32, "n": 3}, "no kernel for 3:32"),
        ({"stripes": 3}, "stripes 3"),
        ({"splits": 0}, "splits 0 is not positive"),
        ({"splits": 2}, "splits 2 is outside 1 ... 1"),
        ({"columns": 512, "splits": 2}, "partials_ptr is null"),
    ):
        changed = [{name: change.get(name, value) for name, value in given.items()} for given in (weight, cut, call)]
        assert sum(name in given for given in changed for name in change) == len(change)
        with pytest.raises(ValueError, match=message):
            compiled.nm_linear(compiled.TiledWeight(**changed[0]), compiled.LinearCut(**changed[1]), **changed[2])


def test_what_is_kept_packed_is_smaller_than_dense():
    for m in GROUP_SIZES:
        dense = [stays_dense(NMPattern(n, m)) for n in range(m + 1)]
        assert dense == sorted(dense) and dense[-1] and not dense[m // 2]
        for n in range(m + 1):
            packed = nm_select(torch.ones(8, 32, dtype=torch.bfloat16), NMPattern(n, m))
            assert packed_share(packed.pattern) == (packed.values.nbytes + packed.bitmask.nbytes) / (2 * 8 * 32)
            assert dense[n] or packed_share(packed.pattern) < 1


def test_a_group_that_the_kernel_does_not_take_is_refused_before_any_work():
    compiled = pytest.importorskip("msp._cuda")

    def weight(**change):
        good = {"values_ptr": 16, "bitmask_ptr": 16, "dtype_code": 2, "rows": 32, "columns": 512}
        return compiled.TiledWeight(**{**good, "group_size": 8, "n": 2, **change})

    def launch(weights, tokens=1, y=16, **change):
        cut = {"form": "gather", "tokens_at_once": tokens, "stripes": 1, "splits": 1, **change}
        compiled.nm_linear_group([(one, 0, y, 0) for one in weights], compiled.LinearCut(**cut), 16, tokens, 0)

    with pytest.raises(ValueError, match=f"{MOST + 1} weights are not 1"):
        launch([weight()] * (MOST + 1))
    with pytest.raises(ValueError, match="0 weights are not 1"):
        launch([])
    with pytest.raises(ValueError, match=f"tokens {MOST_TOKENS + 1} is not one of 1"):
        launch([weight()], tokens=MOST_TOKENS + 1)
    with pytest.raises(ValueError, match="must gather 1 tokens at once"):
        launch([weight()], tokens_at_once=2)
    with pytest.raises(ValueError, match="must gather 2 tokens at once"):
        launch([weight()], tokens=2, form="expand")
    with pytest.raises(ValueError, match="rows 0 is not positive"):
        launch([weight(rows=0)])
    with pytest.raises(ValueError, match="differ in columns or dtype"):
        launch([weight(), weight(columns=256)])
    with pytest.raises(ValueError, match="differ in columns or dtype"):
        launch([weight(), weight(dtype_code=1)])
    with pytest.raises(ValueError, match="y_ptr is null"):
        launch([weight()], y=0)
    with pytest.raises(ValueError, match="a weight of the group is None"):
        launch([None])
