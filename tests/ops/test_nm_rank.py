from __future__ import annotations

import by_hand
import pytest
import torch

from msp.errors import UsageError
from msp.formats.patterns import NMPattern
from msp.ops import force_backend, last_backend, nm_rank, nm_select
from msp.ops.nm_rank import nm_rank_op

BACKENDS = ["reference", "triton", "cpu"]
CASES = [(1, 4, 4), (5, 12, 4), (19, 56, 8), (7, 48, 16), (2, 64, 32)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_as_a_sort_by_hand(backend, dtype, case, device):
    by_hand.need("nm_rank", backend, device)
    rows, columns, m = case
    weight = by_hand.weights(rows, columns, dtype, torch.Generator().manual_seed(columns)).to(device)
    with force_backend(backend):
        found = nm_rank(weight, m)
    assert last_backend("nm_rank") == backend
    assert found.dtype == torch.uint8
    assert torch.equal(found.cpu(), torch.from_numpy(by_hand.ranks(by_hand.scores(weight), m)))


@pytest.mark.parametrize("kind", by_hand.KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_by_every_score(backend, kind, device):
    by_hand.need("nm_rank", backend, device)
    generator = torch.Generator().manual_seed(len(kind))
    for dtype, rows, columns, m in ((torch.float32, 5, 40, 8), (torch.bfloat16, 3, 28, 4)):
        weight = by_hand.weights(rows, columns, dtype, generator).to(device)
        terms = by_hand.to(device, by_hand.terms(kind, rows, columns, generator))
        with force_backend(backend):
            found = nm_rank(weight, m, **terms)
        expected = by_hand.ranks(by_hand.scores(weight, **terms), m)
        assert torch.equal(found.cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_masks_for_every_n_are_nested_in_it(m, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = by_hand.weights(6, 3 * m, torch.float16, generator)
    importance = torch.rand(weight.shape, generator=generator).round(decimals=1)
    rank = nm_rank(weight, m, importance=importance)
    for n in range(m + 1):
        kept = nm_select(weight, NMPattern(n, m), importance=importance).kept()
        assert torch.equal(rank < n, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_a_transposed_weight(backend, device):
    by_hand.need("nm_rank", backend, device)
    weight = by_hand.weights(16, 5, torch.float16, torch.Generator().manual_seed(3)).to(device).t()
    with force_backend(backend):
        found = nm_rank(weight, 8)
    assert found.is_contiguous()
    assert torch.equal(found.cpu(), torch.from_numpy(by_hand.ranks(by_hand.scores(weight), 8)))


@pytest.mark.parametrize("kind", by_hand.KINDS)
def test_every_instruction_set_ranks_as_the_reference(kind, isa):
    generator = torch.Generator().manual_seed(len(kind))
    for dtype in by_hand.DTYPES:
        for rows, columns, m in ((1, 4, 4), (3, 76, 4), (5, 8 * 21, 8), (2, 16 * 17, 16), (2, 32 * 18, 32)):
            weight = by_hand.weights(rows, columns, dtype, generator)
            terms = by_hand.terms(kind, rows, columns, generator)
            # one element further on: vectors must not ask for alignment
            shifted = weight.new_empty(weight.numel() + 1)[1:].view(rows, columns).copy_(weight)
            with force_backend("cpu"):
                found = nm_rank(shifted, m, **terms)
            with force_backend("reference"):
                assert torch.equal(found, nm_rank(weight, m, **terms))


@pytest.mark.parametrize("name", ["weight", "column_scale", "importance", "scores", "row_term"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_what_is_not_finite(backend, name, device):
    by_hand.need("nm_rank", backend, device)
    arguments = {"weight": torch.randn(4, 16)}
    shapes = {"column_scale": 16, "importance": (4, 16), "scores": (4, 16), "row_term": 4}
    if name != "weight":
        arguments[name] = torch.ones(shapes[name])
    if name == "row_term":
        arguments["column_term"] = torch.ones(16)
    arguments[name].view(-1)[1:4] = torch.nan
    total = arguments[name].numel()
    with force_backend(backend), pytest.raises(ValueError, match=f"{name}: 3 of {total} are NaN or infinite"):
        nm_rank(group_size=8, **by_hand.to(device, arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_scores_that_overflow_on_the_way(backend, device):
    by_hand.need("nm_rank", backend, device)
    weight = torch.ones(2, 8, device=device)
    weight[0, :3] = 1e25
    with force_backend(backend), pytest.raises(ValueError, match="scores: 3 of 16 are NaN or infinite"):
        nm_rank(weight, 8, importance=torch.zeros(2, 8, device=device))


def test_triton_writes_only_its_output(device):
    by_hand.need("nm_rank", "triton", device)
    from msp.triton_kernels import nm_rank as kernels

    weight = torch.randn(3, 12, device=device)
    buffer = torch.full((36 + 64,), 99, dtype=torch.uint8, device=device)
    kernels.nm_rank(weight, buffer[32:-32].view(3, 12), group_size=4, kind=0)
    assert (buffer[:32] == 99).all() and (buffer[-32:] == 99).all()
    assert torch.equal(buffer[32:-32].view(3, 12), nm_rank(weight, 4))


def test_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="group size 6 is not supported"):
        nm_rank(torch.ones(2, 12), 6)
    with pytest.raises(ValueError, match="weight has 12 columns, but must have a multiple of 8"):
        nm_rank(torch.ones(2, 12), 8)
    weight = torch.ones(2, 12)
    weight[1, 5] = torch.nan
    with pytest.raises(ValueError, match="weight: 1 of 24 are NaN or infinite"):
        nm_rank(weight, 4)


@pytest.mark.parametrize("kind", ["magnitude", "ria", "given"])
def test_is_a_well_formed_torch_op(kind):
    generator = torch.Generator().manual_seed(1)
    terms = by_hand.terms(kind, 3, 24, generator)
    names = ("column_scale", "row_term", "column_term", "importance", "scores")
    weight = torch.randn(3, 24, generator=generator)
    torch.library.opcheck(nm_rank_op, (weight, [terms.get(name) for name in names], 8))
