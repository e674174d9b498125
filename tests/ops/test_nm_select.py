from __future__ import annotations

import by_hand
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msp.formats.patterns import NMPattern
from msp.ops import force_backend, last_backend, nm_select
from msp.ops.nm_select import nm_select_op

BACKENDS = ["reference", "triton", "cpu", "cuda"]
# rows, columns, group size: one group, one row, a half-filled last byte, rows that fill no whole program
CASES = [(1, 4, 4), (5, 12, 4), (3, 40, 8), (1, 8, 8), (19, 56, 8), (7, 48, 16), (2, 64, 32)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def levels(rows, m, backend):
    """Every N; only some where the interpreter has much to compare."""
    if backend != "triton" or rows == 1:
        return range(m + 1)
    return (0, 2, m - 1, m) if m <= 8 else (5,)


def assert_packed(found, weight, mask, pattern):
    values, bitmask = by_hand.packed(weight.cpu(), mask)
    found.check()
    assert found.pattern == pattern and found.shape == tuple(weight.shape)
    assert torch.equal(found.bitmask.cpu(), bitmask)
    assert torch.equal(found.values.cpu(), values)
    # equal does not tell 0 from -0
    assert torch.equal(torch.signbit(found.values).cpu(), torch.signbit(values))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_what_a_sort_by_hand_keeps(backend, dtype, case, device):
    by_hand.need("nm_select", backend, device)
    rows, columns, m = case
    generator = torch.Generator().manual_seed(rows * columns + m)
    weight = by_hand.weights(rows, columns, dtype, generator).to(device)
    scores = by_hand.scores(weight)
    for n in levels(rows, m, backend):
        with force_backend(backend):
            found = nm_select(weight, NMPattern(n, m))
        assert last_backend("nm_select") == backend
        assert_packed(found, weight, by_hand.kept(scores, n, m), NMPattern(n, m))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", by_hand.KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_by_every_score(backend, kind, seed, device):
    by_hand.need("nm_select", backend, device)
    generator = torch.Generator().manual_seed(seed)
    for dtype, rows, columns, n, m in (
        (torch.bfloat16, 9, 72, 2, 8),
        (torch.float32, 6, 20, 1, 4),
        (torch.float16, 3, 96, 5, 16),
    ):
        weight = by_hand.weights(rows, columns, dtype, generator).to(device)
        terms = by_hand.to(device, by_hand.terms(kind, rows, columns, generator))
        with force_backend(backend):
            found = nm_select(weight, NMPattern(n, m), **terms)
        mask = by_hand.kept(by_hand.scores(weight, **terms), n, m)
        assert_packed(found, weight, mask, NMPattern(n, m))


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:8", "4:8", "7:16", "8:16", "13:32", "16:32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compliant_keeps_at_most_two_of_four(backend, pattern, device):
    by_hand.need("nm_select", backend, device)
    pattern = NMPattern.parse(pattern)
    generator = torch.Generator().manual_seed(pattern.n)
    weight = by_hand.weights(5, 64 + (4 if pattern.m == 4 else 0), torch.float16, generator).to(device)
    terms = by_hand.to(device, {"column_scale": torch.rand(weight.shape[1], generator=generator).round(decimals=1)})
    with force_backend(backend):
        found = nm_select(weight, pattern, **terms, compliant=True)
    mask = by_hand.kept(by_hand.scores(weight, **terms), pattern.n, pattern.m, compliant=True)
    assert mask.reshape(-1, 4).sum(1).max() <= 2
    assert_packed(found, weight, mask, pattern)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_a_transposed_weight(backend, device):
    by_hand.need("nm_select", backend, device)
    stored = by_hand.weights(24, 11, torch.bfloat16, torch.Generator().manual_seed(5)).to(device)
    weight = stored.t()
    with force_backend(backend):
        found = nm_select(weight, NMPattern(3, 8))
    assert_packed(found, weight, by_hand.kept(by_hand.scores(weight), 3, 8), NMPattern(3, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_lower_column(backend, device):
    by_hand.need("nm_select", backend, device)
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, -0.0, 0.0, 1.0]], device=device)
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, 0.0, -0.0, -2.0]], device=device)
    with force_backend(backend):
        assert nm_select(weight, NMPattern(2, 8)).kept().nonzero()[:, 1].tolist() == [0, 1]
        assert nm_select(weight, NMPattern(5, 8)).kept().nonzero()[:, 1].tolist() == [0, 1, 2, 3, 7]
        assert nm_select(weight, NMPattern(3, 8), scores=scores).kept().nonzero()[:, 1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tells_subnormal_scores_apart(backend, device):
    by_hand.need("nm_select", backend, device)
    weight = torch.tensor([[1e-42, 3e-42, 2e-42, 1e-45]], device=device)
    with force_backend(backend):
        assert nm_select(weight, NMPattern(2, 4)).kept().nonzero()[:, 1].tolist() == [1, 2]


def test_triton_writes_only_its_outputs(device):
    by_hand.need("nm_select", "triton", device)
    from msp.triton_kernels import nm_select as kernels

    weight = torch.randn(5, 40, device=device)
    values = torch.full((5 * 10 + 64,), 7.0, device=device)
    bitmask = torch.full((5 * 5 + 64,), 7, dtype=torch.uint8, device=device)
    kernels.nm_select(
        weight,
        values[32:-32].view(5, 10),
        bitmask[32:-32].view(5, 5),
        n=2,
        group_size=8,
        kind=0,
        compliant=False,
    )
    for buffer in (values, bitmask):
        assert (buffer[:32] == 7).all() and (buffer[-32:] == 7).all()
    expected = nm_select(weight, NMPattern(2, 8))
    assert torch.equal(values[32:-32].view(5, 10), expected.values)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_keeps_the_best_of_any_weights(data):
    m = data.draw(st.sampled_from((4, 8, 16, 32)))
    n = data.draw(st.integers(0, m))
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    size = rows * groups * m
    numbers = st.sampled_from([0.0, -0.0, 0.5, -0.5, 3.0]) | st.floats(-1e4, 1e4, width=16)
    weight = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))).view(rows, groups * m)
    found = nm_select(weight, NMPattern(n, m))
    found.check()
    kept = found.kept()
    assert torch.equal(found.unpack(), weight.masked_fill(~kept, 0))
    worst = weight.abs().masked_fill(~kept, torch.inf).view(-1, m).amin(1)
    best = weight.abs().masked_fill(kept, -torch.inf).view(-1, m).amax(1)
    assert (best <= worst).all()


def test_result_does_not_follow_gradients():
    weight = torch.nn.Parameter(torch.randn(2, 8))
    found = nm_select(weight, NMPattern(2, 8), column_scale=torch.rand(8, requires_grad=True))
    assert not found.values.requires_grad


def test_takes_terms_of_any_float_dtype():
    weight = torch.randn(4, 16)
    scale = torch.rand(16)
    expected = nm_select(weight, NMPattern(2, 8), column_scale=scale.bfloat16().float())
    for dtype in (torch.bfloat16, torch.float64):
        found = nm_select(weight, NMPattern(2, 8), column_scale=scale.bfloat16().to(dtype))
        assert torch.equal(found.bitmask, expected.bitmask)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "weight is torch.float64, but must be one of float32, float16, bfloat16", {"weight": "double"}),
        (TypeError, "weight is torch.int32", {"weight": "int"}),
        (ValueError, r"weight has shape \[4, 4, 4\], but must be a matrix", {"weight": torch.ones(4, 4, 4)}),
        (ValueError, "weight has 12 columns, but must have a multiple of 8", {"weight": torch.ones(4, 12)}),
        (ValueError, r"column_scale has shape \[4\], but must have \[16\]", {"column_scale": torch.ones(4)}),
        (ValueError, r"row_term has shape \[16\], but must have \[4\]", {"row_term": torch.ones(16)}),
        (ValueError, r"importance has shape \[16, 4\]", {"importance": torch.ones(16, 4)}),
        (ValueError, "row_term and column_term go together", {"row_term": torch.ones(4)}),
        (ValueError, "row_term and column_term go together", {"column_term": torch.ones(16)}),
        (
            ValueError,
            "importance excludes other terms, but column_scale",
            {"importance": torch.ones(4, 16), "column_scale": torch.ones(16)},
        ),
        (
            ValueError,
            "importance excludes other terms, but scores was",
            {"scores": torch.ones(4, 16), "importance": torch.ones(4, 16)},
        ),
        (TypeError, "column_scale is torch.int64", {"column_scale": torch.ones(16, dtype=torch.int64)}),
        (ValueError, "scores is on meta, but weight is on cpu", {"scores": torch.ones(4, 16, device="meta")}),
        (ValueError, "pattern 5:8 cannot be compliant", {"pattern": NMPattern(5, 8), "compliant": True}),
    ],
)
def test_refuses_what_does_not_fit(error, message, change):
    arguments = {"weight": torch.ones(4, 16), "pattern": NMPattern(2, 8)} | change
    if isinstance(arguments["weight"], str):
        arguments["weight"] = getattr(torch.ones(4, 16), arguments["weight"])()
    with pytest.raises(error, match=message):
        nm_select(**arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["weight", "column_scale", "importance", "scores", "row_term"])
def test_counts_what_is_not_finite(name, bad):
    arguments = {"weight": torch.randn(4, 16)}
    shapes = {"column_scale": 16, "importance": (4, 16), "scores": (4, 16), "row_term": 4}
    if name != "weight":
        arguments[name] = torch.ones(shapes[name])
    if name == "row_term":
        arguments["column_term"] = torch.ones(16)
    arguments[name].view(-1)[1:4] = bad
    total = arguments[name].numel()
    with pytest.raises(ValueError, match=f"{name}: 3 of {total} are NaN or infinite"):
        nm_select(pattern=NMPattern(2, 8), **arguments)


@pytest.mark.parametrize("kind", ["wanda", "ria", "fisher"])
def test_counts_scores_that_overflow(kind):
    weight = torch.ones(2, 8)
    weight[0, :3] = 1e15
    large = torch.full((8,), 1e25)
    terms = {
        "wanda": {"column_scale": large},
        "ria": {"row_term": torch.full((2,), 1e25), "column_term": torch.zeros(8)},
        "fisher": {"importance": large.expand(2, 8)},
    }[kind]
    with pytest.raises(ValueError, match="scores: 3 of 16 are NaN or infinite"):
        nm_select(weight, NMPattern(2, 8), **terms)


def test_extremes_that_never_meet_do_no_harm():
    weight = torch.ones(2, 8)
    weight[0, :3] = 1e25
    scale = torch.tensor([1e-25] * 3 + [1e25] * 5)
    assert nm_select(weight, NMPattern(2, 8), column_scale=scale).kept()[:, 3:5].all()


def test_takes_the_largest_finite_weights():
    weight = torch.full((1, 8), torch.finfo(torch.float32).max)
    assert nm_select(weight, NMPattern(2, 8)).kept()[0].tolist() == [True] * 2 + [False] * 6


@pytest.mark.parametrize("kind", by_hand.KINDS)
def test_is_a_well_formed_torch_op(kind):
    generator = torch.Generator().manual_seed(0)
    given_terms = by_hand.terms(kind, 3, 24, generator)
    names = ("column_scale", "row_term", "column_term", "importance", "scores")
    weight = torch.randn(3, 24, generator=generator)
    torch.library.opcheck(nm_select_op, (weight, [given_terms.get(name) for name in names], 2, 8, False))
