from __future__ import annotations

import pytest
import torch
from oracles import fisher_expected

from msp.ops import _gradients, available_backends, fisher_diag_, force_backend, last_backend
from msp.ops.fisher_diag import fisher_diag_op

SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 5, 7),
    (5, 1, 3, 130),
    (3, 17, 33, 20),
    (2, 70, 129, 66),
    (1, 131, 16, 48),
    (2, 70, 136, 72),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", "triton", "cpu"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    if backend not in available_backends("fisher_diag_"):
        pytest.skip(f"{backend} is not available here")
    if backend == "cpu" and torch.cuda.is_available():
        pytest.skip("tensors are on the GPU here")
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("tl.dot on bfloat16 is wrong in Triton's interpreter")


def make(shape, dtype, seed):
    sequences, tokens, rows, columns = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    x = torch.randn(sequences, tokens, columns).to(device, dtype)
    g = torch.randn(sequences, tokens, rows).to(device, dtype)
    return torch.rand(rows, columns, device=device), x, g


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_the_squared_gradient_of_each_sequence(backend, shape, dtype, seed):
    skip_unless_served(backend, dtype)
    acc, x, g = make(shape, dtype, seed)
    want, size = fisher_expected(acc, x, g)
    with force_backend(backend):
        returned = fisher_diag_(acc, x, g)
    assert returned is acc
    assert last_backend("fisher_diag_") == backend
    assert ((acc.double() - want).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("tile", [(1, 1), (6, 4), (40, 7), (1 << 22, 4096)], ids=str)
def test_tiles_of_any_shape_cover_the_gradient(tile, monkeypatch):
    skip_unless_served("cpu", torch.float32)
    monkeypatch.setattr(_gradients, "TILE_NUMBERS", tile[0])
    monkeypatch.setattr(_gradients, "TILE_COLUMNS", tile[1])
    acc, x, g = make((2, 5, 13, 11), torch.float32, 10)
    want, size = fisher_expected(acc, x, g)
    with force_backend("cpu"):
        fisher_diag_(acc, x, g)
    assert ((acc.double() - want).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_only_the_accumulator_it_is_given(backend):
    skip_unless_served(backend, torch.float32)
    acc, x, g = make((2, 9, 21, 37), torch.float32, 3)
    surroundings = torch.full((60, 45), float("nan"), device=acc.device)
    inner = surroundings.t()[4:25, 8:45]  # strided both ways
    inner.copy_(acc)
    want, size = fisher_expected(acc, x, g)
    with force_backend(backend):
        fisher_diag_(inner, x, g)
    assert ((inner.double() - want).abs() <= 1e-5 * size).all()
    assert surroundings.isnan().sum() == surroundings.numel() - inner.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_views(backend):
    skip_unless_served(backend, torch.float32)
    acc, x, g = make((2, 11, 6, 10), torch.float32, 4)
    want, size = fisher_expected(acc, x, g)
    wide = torch.full((2, 10, 22), float("nan"), device=x.device)
    wide[:, :, ::2] = x.transpose(1, 2)
    with force_backend(backend):
        fisher_diag_(acc, wide[:, :, ::2].transpose(1, 2), g.transpose(0, 1).contiguous().transpose(0, 1))
    assert ((acc.double() - want).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_may_come_one_at_a_time(backend):
    skip_unless_served(backend, torch.float16)
    acc, x, g = make((3, 8, 5, 9), torch.float16, 5)
    want, size = fisher_expected(acc, x, g)
    with force_backend(backend):
        for s in range(3):
            fisher_diag_(acc, x[s : s + 1], g[s : s + 1])
    assert ((acc.double() - want).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5)])
def test_nothing_to_add(shape):
    acc, x, g = make(shape, torch.float32, 6)
    before = acc.clone()
    assert torch.equal(fisher_diag_(acc, x, g), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda acc, x, g: (acc.double(), x, g), TypeError, "acc is torch.float64"),
        (lambda acc, x, g: (acc, x.long(), g), TypeError, "x is torch.int64"),
        (lambda acc, x, g: (acc, x, g.half()), TypeError, "one dtype"),
        (lambda acc, x, g: (acc.t(), x, g), ValueError, r"acc has shape \[7, 5\], needed is \[5, 7\]"),
        (lambda acc, x, g: (acc, x[:1], g), ValueError, r"\[1, 3, 7\]"),
        (lambda acc, x, g: (acc, x[0], g[0]), ValueError, r"needed are \[S, T, K\]"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    acc, x, g = make((2, 3, 5, 7), torch.float32, 7)
    before = acc.clone()
    with pytest.raises(error, match=message):
        fisher_diag_(*change(acc, x, g))
    assert torch.equal(acc, before)


@pytest.mark.parametrize(("name", "value"), [("x", float("nan")), ("g", float("inf")), ("g", float("-inf"))])
def test_counts_what_is_not_finite(name, value):
    acc, x, g = make((2, 3, 5, 7), torch.float32, 8)
    before = acc.clone()
    (x if name == "x" else g)[1, :2, 0] = value
    with pytest.raises(ValueError, match=rf"2 of the \d+ values of {name} are NaN or infinite"):
        fisher_diag_(acc, x, g)
    assert torch.equal(acc, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_well_formed_torch_op(dtype):
    torch.library.opcheck(fisher_diag_op, make((2, 3, 5, 7), dtype, 9))
