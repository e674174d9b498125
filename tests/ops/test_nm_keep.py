from __future__ import annotations

import by_hand
import pytest
import torch

from msp.errors import UsageError
from msp.formats.patterns import NMPattern
from msp.ops import force_backend, last_backend, nm_keep, nm_rank, nm_select
from msp.ops.nm_keep import nm_keep_into_op, nm_keep_op

BACKENDS = ["reference", "triton", "cpu"]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(rows, columns, m, dtype, device, seed):
    weight = by_hand.weights(rows, columns, dtype, torch.Generator().manual_seed(seed)).to(device)
    return weight, nm_rank(weight, m)


def by_loop(weight, rank, n):
    result = torch.zeros(weight.shape)
    for row, column in (rank < n).cpu().nonzero().tolist():
        result[row, column] = weight[row, column]
    return result.to(weight.device, weight.dtype)


@pytest.mark.parametrize("case", [(1, 4, 4), (17, 132, 4), (5, 40, 8), (33, 16, 16), (2, 64, 32)], ids=str)
@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_what_ranks_below_n(backend, dtype, case, device):
    by_hand.need("nm_keep", backend, device)
    rows, columns, m = case
    weight, rank = make(rows, columns, m, dtype, device, seed=rows)
    for n in (0, 1, m - 1, m):
        out = torch.full_like(weight, torch.nan)
        with force_backend(backend):
            returned = nm_keep(weight, rank, n, out=out)
            fresh = nm_keep(weight, rank, n)
        assert last_backend("nm_keep") == backend
        assert returned is out
        expected = by_loop(weight, rank, n)
        assert torch.equal(out, expected) and torch.equal(fresh, expected)
        assert not torch.signbit(out[rank >= n]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_selection(backend, device):
    by_hand.need("nm_keep", backend, device)
    weight, rank = make(6, 32, 8, torch.float16, device, 0)
    with force_backend(backend):
        kept = nm_keep(weight, rank, 3)
    assert torch.equal(kept, nm_select(weight, NMPattern(3, 8)).unpack())


@pytest.mark.parametrize("backend", ["reference", "triton", None])
def test_reads_and_writes_any_strides(backend, device):
    if backend:
        by_hand.need("nm_keep", backend, device)
    weight, rank = make(9, 24, 8, torch.float32, device, 4)
    stored = weight.t().contiguous()
    wide = torch.full((9, 48), torch.nan, device=device)
    for w, out in (
        (stored.t(), torch.full_like(stored, torch.nan).t()),
        (weight, torch.full_like(stored, torch.nan).t()),
        (stored.t(), wide[:, ::2]),
    ):
        with force_backend(backend):
            nm_keep(w, rank, 2, out=out)
        assert torch.equal(out, by_loop(weight, rank, 2))
    assert wide[:, 1::2].isnan().all()


def test_the_kernel_of_the_cpu_leaves_strides_and_other_dtypes_to_the_reference():
    by_hand.need("nm_keep", "cpu", torch.device("cpu"))
    weight, rank = make(8, 24, 8, torch.float32, "cpu", 5)
    with force_backend(None):
        nm_keep(weight, rank, 2)
        assert last_backend("nm_keep") == "cpu"
        for other in (weight.t().contiguous().t(), weight.double()):
            assert torch.equal(nm_keep(other, rank, 2), nm_keep(weight, rank, 2).to(other.dtype))
            nm_keep(other, rank, 2)
            assert last_backend("nm_keep") == "reference"
    with force_backend("cpu"), pytest.raises(UsageError, match="does not support these arguments"):
        nm_keep(weight.double(), rank, 2)


@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
def test_starts_anywhere_in_memory(dtype, device):
    by_hand.need("nm_keep", "cpu", device)
    weight, rank = make(5, 40, 8, dtype, device, 6)
    for offset in (1, 3):
        w, r, out = (tensor.new_empty(offset + 200)[offset:].view(5, 40) for tensor in (weight, rank, weight))
        with force_backend("cpu"):
            nm_keep(w.copy_(weight), r.copy_(rank), 3, out=out)
        assert torch.equal(out, by_loop(weight, rank, 3))


def test_writes_into_a_parameter():
    weight, rank = make(4, 16, 8, torch.float32, "cpu", 1)
    parameter = torch.nn.Parameter(torch.zeros(4, 16))
    assert nm_keep(weight, rank, 2, out=parameter) is parameter
    assert parameter.requires_grad and parameter.is_leaf
    assert torch.equal(parameter, by_loop(weight, rank, 2))


def test_needs_no_finite_weights():
    weight = torch.tensor([[torch.nan, 1.0, torch.inf, 2.0]])
    rank = torch.tensor([[3, 1, 2, 0]], dtype=torch.uint8)
    assert nm_keep(weight, rank, 2).tolist() == [[0.0, 1.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "rank is torch.int64, but must be uint8", {"rank": torch.zeros(2, 8, dtype=torch.int64)}),
        (ValueError, r"rank has shape \[8, 2\], but weight has \[2, 8\]", {"rank": torch.zeros(8, 2).byte()}),
        (ValueError, "must be a matrix", {"weight": torch.zeros(2, 8, 1)}),
        (ValueError, "n is -1, but must be at least 0", {"n": -1}),
        (TypeError, "out is torch.float16, but weight is torch.float32", {"out": torch.zeros(2, 8).half()}),
        (ValueError, r"out has shape \[2, 4\], but weight has \[2, 8\]", {"out": torch.zeros(2, 4)}),
        (ValueError, "out is on meta, but weight is on cpu", {"out": torch.zeros(2, 8, device="meta")}),
    ],
)
def test_refuses_what_does_not_fit(error, message, change):
    arguments = {"weight": torch.zeros(2, 8), "rank": torch.zeros(2, 8).byte(), "n": 2} | change
    with pytest.raises(error, match=message):
        nm_keep(**arguments)


def test_is_a_well_formed_torch_op():
    weight, rank = make(3, 24, 8, torch.float32, "cpu", 2)
    torch.library.opcheck(nm_keep_op, (weight, rank, 2))
    torch.library.opcheck(nm_keep_into_op, (weight, rank, 2, torch.zeros(3, 24)))
