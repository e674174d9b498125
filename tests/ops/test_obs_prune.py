from __future__ import annotations

import numpy as np
import pytest
import torch

from msp.ops import available_backends, force_backend, last_backend, nm_select, obs_prune
from msp.ops._dispatch import compiled_module
from msp.ops.obs_prune import obs_prune_op, reference
from msp.ops.obs_prune import op as dispatched
from msp.patterns import NMPattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", "cuda", "triton", "cpu"]
ISAS = ["scalar", "avx2", "avx512"]
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
FINE = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def skip_unless_served(backend: str) -> None:
    if backend not in available_backends("obs_prune") or (backend == "cpu" and DEVICE != "cpu"):
        pytest.skip(f"{backend} is not available here")


def make(rows, columns, dtype, seed):
    """A weight, and the inverse Hessian's factor of correlated inputs."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5 + torch.eye(columns)
    x = torch.randn(3 * columns, columns, dtype=torch.float64) @ mixing
    hessian = 2 * x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return torch.randn(rows, columns).to(DEVICE, dtype), factor.float().to(DEVICE)


def published(weight, factor, n, m, block):
    """SparseGPT's `fasterprune` in float64 with plain loops; returns the weight and what it kept."""
    w, u = weight.double().cpu().numpy().copy(), factor.double().cpu().numpy()
    rows, columns = w.shape
    kept = np.ones((rows, columns), dtype=bool)
    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        error = np.zeros((rows, i2 - i1))
        for i in range(i1, i2):
            if (i - i1) % m == 0:
                for r in range(rows):
                    saliency = [w[r, j] ** 2 / u[j, j] ** 2 for j in range(i, i + m)]
                    for j in np.argsort(saliency)[: m - n]:
                        kept[r, i + j] = False
            for r in range(rows):
                q = w[r, i] if kept[r, i] else 0.0
                error[r, i - i1] = (w[r, i] - q) / u[i, i]
                w[r, i + 1 : i2] -= error[r, i - i1] * u[i, i + 1 : i2]
                w[r, i] = q
        w[:, i2:] -= error @ u[i1:i2, i2:]
    return torch.from_numpy(w), torch.from_numpy(kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_published_algorithm_in_float64(backend, case, dtype):
    skip_unless_served(backend)
    rows, columns, text, block = case
    pattern = NMPattern.parse(text)
    weight, factor = make(rows, columns, dtype, seed=rows + columns)
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
    weight, factor = make(6, 64, torch.float32, seed)
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
    weight, factor = make(5, 24, torch.bfloat16, 0)
    with force_backend(backend):
        dense = obs_prune(weight, factor, NMPattern(8, 8), block_size=16)
        empty = obs_prune(weight, factor, NMPattern(0, 8), block_size=16)
    assert torch.equal(dense.unpack(), weight)
    assert empty.values.shape == (5, 0) and not empty.bitmask.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_views_and_nothing_below_the_diagonal(backend):
    skip_unless_served(backend)
    weight, factor = make(6, 40, torch.float32, 1)
    noisy = factor + torch.randn_like(factor).tril(-1)
    with force_backend(backend):
        want = obs_prune(weight, factor, NMPattern(1, 4), block_size=16)
        found = obs_prune(weight.t().contiguous().t(), noisy.t().contiguous().t(), NMPattern(1, 4), block_size=16)
    assert torch.equal(found.bitmask, want.bitmask)
    assert torch.equal(found.values, want.values)


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
    weight, factor = make(3, 24, torch.float32, 2)
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
    torch.library.opcheck(obs_prune_op, (*make(5, 16, dtype, 3), 2, 8, 8))


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    skip_unless_served("cpu")
    monkeypatch.setenv("MSP_ISA", request.param)
    try:
        assert compiled_module("msp._cpu").isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    with force_backend("cpu"):
        yield request.param


def unblocked(weight, factor, kept):
    """The sweep in float64, one column after another, with the choice given."""
    w, u = weight.double(), factor.double()
    for i in range(w.shape[1]):
        error = torch.where(kept[:, i], 0.0, w[:, i]) / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    return w.masked_fill(~kept, 0.0)


# One row, one group, tiles and panels that are partly filled, blocks that end inside a vector, several of all
SHAPES = [(1, 4), (1, 32), (2, 128), (5, 132), (17, 192), (95, 260), (96, 160), (103, 388), (200, 64), (211, 328)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_cpu_keeps_what_the_reference_keeps(isa, m, shape):
    rows, columns = shape[0], -(-shape[1] // m) * m
    for n in (m // 4, m - 1):
        weight, factor = make(rows, columns, torch.float32, seed=rows * columns + n)
        updated, kept = dispatched(weight, factor, n, m, 128)
        assert (kept.view(rows, -1, m).sum(-1) == n).all()
        assert (updated[~kept] == 0).all() and not torch.signbit(updated[~kept]).any()
        # one other order of operations may choose otherwise where two scores are all but equal
        same = (kept == reference(weight, factor, n, m, 128)[1]).all(1)
        assert same.double().mean() >= (0.97 if rows > 50 else 1.0)
        want = unblocked(weight, factor, kept)
        scale = want.abs().mean()
        assert ((updated - want).abs() <= 1e-4 * want.abs() + 1e-5 * scale).all()


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_cpu_every_level(isa, m):
    for n in range(m + 1):
        weight, factor = make(19, 160, torch.float32, n)
        kept = dispatched(weight, factor, n, m, 128)[1]
        assert torch.equal(kept, reference(weight, factor, n, m, 128)[1])


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_cpu_ties_go_to_the_lower_column(isa, m):
    torch.manual_seed(m)
    weight = torch.randint(-2, 3, (101, 192)).float()
    weight[weight == 0] *= torch.where(torch.rand(int((weight == 0).sum())) < 0.5, 1.0, -1.0)
    # powers of two: scores of different columns are equal too
    factor = torch.diag(2.0 ** torch.randint(-1, 2, (192,)))
    for n in range(0, m + 1, m // 4):
        updated, kept = dispatched(weight, factor, n, m, 128)
        want, chosen = reference(weight, factor, n, m, 128)
        assert torch.equal(kept, chosen)
        assert torch.equal(updated, want)


def test_cpu_neither_threads_nor_blocks_nor_strides_change_a_bit(isa):
    weight, factor = make(211, 392, torch.float32, 7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want, chosen = dispatched(weight, factor, 3, 8, 128)
        for threads in range(2, 9):
            torch.set_num_threads(threads)
            for _ in range(2):
                updated, kept = dispatched(weight, factor, 3, 8, 128)
                assert torch.equal(updated, want) and torch.equal(kept, chosen)
    finally:
        torch.set_num_threads(before)
    for block in (8, 64, 1024):
        assert torch.equal(dispatched(weight, factor, 3, 8, block)[0], want)
    assert torch.equal(dispatched(weight.t().contiguous().t(), factor.t().contiguous().t(), 3, 8, 128)[0], want)
    wide = torch.full((211, 500), torch.nan)
    wide[:, 50:442] = weight
    assert torch.equal(dispatched(wide[:, 50:442], factor, 3, 8, 128)[0], want)
    for rows in (1, 6, 97):
        assert torch.equal(dispatched(weight[:rows], factor, 3, 8, 128)[0], want[:rows])


def test_cpu_vector_paths_agree_to_the_bit(monkeypatch):
    skip_unless_served("cpu")
    weight, factor = make(103, 268, torch.float32, 8)
    found = []
    for name in ("avx2", "avx512"):
        monkeypatch.setenv("MSP_ISA", name)
        try:
            compiled_module("msp._cpu").isa()
        except RuntimeError as error:
            pytest.skip(str(error))
        with force_backend("cpu"):
            found.append(dispatched(weight, factor, 1, 4, 128))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_cpu_reads_nothing_below_the_diagonal(isa):
    weight, factor = make(40, 264, torch.float32, 9)
    below = torch.full_like(factor, torch.nan).tril(-1)
    noisy = torch.where(below.isnan(), below, factor)
    want, found = (obs_prune(weight, u, NMPattern(2, 8)) for u in (factor, noisy))
    assert torch.equal(found.bitmask, want.bitmask) and torch.equal(found.values, want.values)


def test_cpu_keeps_what_overflows_so_that_it_is_seen(isa):
    factor = torch.eye(16)
    factor[0, 9] = -3e38
    weight = torch.ones(3, 16)
    weight[:, 0], weight[:, 9] = 0.5, 3e38
    weight[1, 0] = -1e-3
    weight[2, 0] = 4.0  # kept: no error, no overflow
    updated, kept = dispatched(weight, factor, 4, 8, 128)
    want, chosen = reference(weight, factor, 4, 8, 128)
    assert torch.equal(kept, chosen) and torch.equal(updated, want)
    assert torch.isinf(updated[0]).sum() == 1 and torch.isfinite(updated[2]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_packs_kept_zeros(isa, dtype):
    weight = torch.zeros(5, 32, dtype=dtype)
    weight[:, 3] = 1.0
    packed = obs_prune(weight, torch.eye(32), NMPattern(2, 8))
    packed.check()
    assert packed.kept()[0].nonzero()[:, 0].tolist() == [0, 3, 8, 9, 16, 17, 24, 25]
    assert torch.equal(packed.unpack(), weight)


def call(weight, factor, updated, kept, group_size=8, n=2, rows=None, columns=None, threads=2):
    pointers = (0 if tensor is None else tensor.data_ptr() for tensor in (weight, factor, updated, kept))
    rows, columns = (given or size for given, size in zip((rows, columns), weight.shape, strict=True))
    compiled_module("msp._cpu").obs_prune(*pointers, rows, columns, group_size, n, threads)


def test_cpu_writes_only_its_outputs(isa):
    for rows, columns in ((1, 8), (97, 136), (5, 328)):
        weight, factor = make(rows, columns, torch.float32, 10)
        size = rows * columns
        updated, kept = torch.full((size + 128,), 77.0), torch.full((size + 128,), 77, dtype=torch.uint8)
        before = weight.clone()
        call(weight, factor.contiguous(), updated[64:], kept[64:])
        for buffer in (updated, kept):
            assert (buffer[:64] == 77).all() and (buffer[64 + size :] == 77).all()
        want, chosen = dispatched(weight, factor, 2, 8, 128)
        assert torch.equal(weight, before)
        assert torch.equal(updated[64 : 64 + size].view(rows, columns), want)
        assert torch.equal(kept[64 : 64 + size].view(rows, columns), chosen.to(torch.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 6}, "group_size 6 is not one of 4, 8, 16, 32"),
        ({"group_size": 16}, "40 columns are not a multiple of group_size 16"),
        ({"n": 9}, r"n 9 is outside 0 \.\.\. 8"),
        ({"n": -1}, r"n -1 is outside 0 \.\.\. 8"),
        ({"rows": -1}, "negative size"),
        ({"factor": None}, "factor_ptr is null"),
        ({"updated": None}, "updated_ptr is null"),
        ({"kept": None}, "kept_ptr is null"),
        ({"updated": torch.empty(1000, dtype=torch.uint8)[1:]}, "updated_ptr is not a multiple of 4"),
    ],
)
def test_cpu_refuses_wrong_arguments(change, message):
    skip_unless_served("cpu")
    weight, factor = make(3, 40, torch.float32, 11)
    arguments = {
        "factor": factor.contiguous(),
        "updated": torch.empty(120),
        "kept": torch.empty(120, dtype=torch.bool),
    } | change
    with pytest.raises(ValueError, match=message):
        call(weight, **arguments)
