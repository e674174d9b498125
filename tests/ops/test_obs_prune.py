from __future__ import annotations

import pytest
import torch
from oracles import DEVICE, FINE, published, sweep_inputs

from msp.formats.patterns import NMPattern
from msp.ops import available_backends, force_backend, last_backend, nm_select, obs_prune
from msp.ops.obs_prune import float32_products, obs_prune_op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", "cuda", "triton", "cpu"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")
# rows, columns, pattern, block size: single rows, a short last block, groups as wide as a block
CASES = [
    (1, 4, "2:4", 4),
    (1, 40, "1:4", 16),
    (7, 48, "2:8", 32),
    (18, 72, "3:8", 24),
    (5, 96, "5:16", 64),
    (9, 64, "4:32", 32),
    (3, 136, "2:8", 128),
]


def skip_unless_served(backend: str) -> None:
    if backend not in available_backends("obs_prune") or (backend == "cpu" and DEVICE != "cpu"):
        pytest.skip(f"{backend} is not available here")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_published_algorithm_in_float64(backend, case, dtype):
    skip_unless_served(backend)
    rows, columns, text, block = case
    pattern = NMPattern.parse(text)
    weight, factor = sweep_inputs(rows, columns, dtype, seed=rows + columns)
    before = weight.clone()
    want, kept = published(weight, factor, pattern.n, pattern.m, block)
    with force_backend(backend):
        packed = obs_prune(weight, factor, pattern, block_size=block)
    assert last_backend("obs_prune") == backend
    assert torch.equal(weight, before)
    assert packed.dtype == dtype and packed.pattern == pattern
    assert torch.equal(packed.kept().cpu(), kept)
    found = packed.unpack().double().cpu()
    assert (found[~kept] == 0).all()
    scale = want.abs().mean()
    assert ((found - want).abs() <= (1e-4 + FINE[dtype]) * want.abs() + 1e-4 * scale).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_block_size_changes_nothing_but_rounding(backend, seed):
    skip_unless_served(backend)
    weight, factor = sweep_inputs(6, 64, torch.float32, seed)
    with force_backend(backend):
        small, large = (obs_prune(weight, factor, NMPattern(3, 8), block_size=size) for size in (8, 256))
    assert torch.equal(small.bitmask, large.bitmask)
    torch.testing.assert_close(small.values, large.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_with_uncorrelated_inputs_it_is_magnitude_pruning_and_ties_go_to_the_lower_column(backend, m):
    skip_unless_served(backend)
    torch.manual_seed(m)
    weight = torch.randint(-2, 3, (11, 64), device=DEVICE).float()  # full of ties
    with force_backend(backend):
        packed = obs_prune(weight, torch.eye(64, device=DEVICE), NMPattern(m // 4, m))
    plain = nm_select(weight, NMPattern(m // 4, m))
    assert torch.equal(packed.bitmask, plain.bitmask)
    assert torch.equal(packed.values, plain.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_keeps_all_and_empty_keeps_nothing(backend):
    skip_unless_served(backend)
    weight, factor = sweep_inputs(5, 24, torch.bfloat16, 0)
    with force_backend(backend):
        dense = obs_prune(weight, factor, NMPattern(8, 8), block_size=16)
        empty = obs_prune(weight, factor, NMPattern(0, 8), block_size=16)
    assert torch.equal(dense.unpack(), weight)
    assert empty.values.shape == (5, 0) and not empty.bitmask.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_views_and_nothing_below_the_diagonal(backend):
    skip_unless_served(backend)
    weight, factor = sweep_inputs(6, 40, torch.float32, 1)
    noisy = factor + torch.randn_like(factor).tril(-1)
    with force_backend(backend):
        want = obs_prune(weight, factor, NMPattern(1, 4), block_size=16)
        found = obs_prune(weight.t().contiguous().t(), noisy.t().contiguous().t(), NMPattern(1, 4), block_size=16)
    assert torch.equal(found.bitmask, want.bitmask)
    assert torch.equal(found.values, want.values)


def test_products_are_in_float32_whatever_the_process_allows():
    def allowed():
        matmul = torch.backends.cuda.matmul
        return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32

    before = allowed()
    torch.set_float32_matmul_precision("high")
    try:
        high = allowed()
        assert high not in (False, "none", "ieee")
        with float32_products():
            assert allowed() in (False, "ieee")
        assert allowed() == high
    finally:
        torch.set_float32_matmul_precision("highest")
    assert before in (False, "none", "ieee")


def test_no_rows():
    packed = obs_prune(torch.empty(0, 16), torch.eye(16), NMPattern(2, 8))
    assert packed.shape == (0, 16) and packed.values.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w, u, b: (w.double(), u, b), TypeError, "weight is torch.float64"),
        (lambda w, u, b: (w, u.double(), b), TypeError, "hinv_chol is torch.float64"),
        (lambda w, u, b: (w[:, :20], u[:20, :20], b), ValueError, "weight has 20 columns.* multiple of 8"),
        (lambda w, u, b: (w, u[:16], b), ValueError, r"\[16, 24\], needed is \[24, 24\]"),
        (lambda w, u, b: (w, u, 12), ValueError, "block_size is 12.*multiple of 8"),
        (lambda w, u, b: (w, u, 0), ValueError, "block_size is 0"),
        (lambda w, u, b: (w, -u, b), ValueError, "24 of the 24 diagonal entries"),
        (lambda w, u, b: (w / 0, u, b), ValueError, "72 of the 72 values of weight are NaN or infinite"),
        (lambda w, u, b: (w, u.fill_diagonal_(float("nan")), b), ValueError, "24 of the 576 values of hinv_chol"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    weight, factor = sweep_inputs(3, 24, torch.float32, 2)
    weight, factor, block = change(weight, factor, 16)
    with pytest.raises(error, match=message):
        obs_prune(weight, factor, NMPattern(2, 8), block_size=block)


@pytest.mark.parametrize("backend", BACKENDS)
def test_says_when_an_updated_weight_overflows(backend):
    skip_unless_served(backend)
    factor = torch.eye(8, device=DEVICE)
    factor[:, 7] = -10.0
    factor[7, 7] = 1.0
    weight = torch.full((2, 8), 2e4, dtype=torch.float16, device=DEVICE)
    weight[:, 7] = 6e4
    with force_backend(backend), pytest.raises(ValueError, match="2 of the 16 values of weight, once updated"):
        obs_prune(weight, factor, NMPattern(4, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_well_formed_torch_op(dtype):
    torch.library.opcheck(obs_prune_op, (*sweep_inputs(5, 16, dtype, 3), 2, 8, 8))
