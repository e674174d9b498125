from __future__ import annotations

import pytest
import torch

from msp.errors import UsageError
from msp.ops import available_backends, fisher_diag_, fisher_trace, force_backend, last_backend
from msp.ops.fisher_trace import fisher_trace_op, gram_is_cheaper

SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 5, 7),
    (5, 1, 3, 130),
    (3, 17, 33, 20),
    (2, 70, 129, 66),
    (1, 300, 16, 20),
    (2, 70, 136, 72),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["reference", "triton", "cpu"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")
FORMS = ["direct", "gram"]


def skip_unless_served(backend: str, dtype: torch.dtype, form: str = "direct") -> None:
    if backend not in available_backends("fisher_trace"):
        pytest.skip(f"{backend} is not available here")
    if backend == "cpu" and torch.cuda.is_available():
        pytest.skip("tensors are on the GPU here")
    if backend == "cpu" and form == "gram":
        pytest.skip("the reference serves the Gram form")
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("tl.dot on bfloat16 is wrong in Triton's interpreter")


def make(shape, dtype, seed):
    sequences, tokens, rows, columns = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    # A common direction, as real gradients have: without one, the terms off the diagonal hardly count.
    x = (torch.randn(sequences, tokens, columns) + torch.randn(columns)).to(device, dtype)
    g = (torch.randn(sequences, tokens, rows) + torch.randn(rows)).to(device, dtype)
    return x, g


def expected(x, g):
    return torch.einsum("sto,sti->soi", g.double(), x.double()).square().sum().item()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_the_squared_gradients(backend, form, shape, dtype, seed):
    skip_unless_served(backend, dtype, form)
    x, g = make(shape, dtype, seed)
    with force_backend(backend):
        trace = fisher_trace(x, g, form=form)
    assert trace.shape == () and trace.dtype == torch.float32
    assert last_backend("fisher_trace") == backend
    assert trace.item() == pytest.approx(expected(x, g), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 40, 60), (2, 200, 8, 6)])
def test_is_the_sum_of_the_diagonal_in_whichever_form_it_picks(shape):
    x, g = make(shape, torch.float32, 3)
    diagonal = fisher_diag_(torch.zeros(shape[2], shape[3], device=x.device), x, g)
    assert fisher_trace(x, g).item() == pytest.approx(diagonal.sum().item(), rel=1e-5)


def test_the_reference_serves_the_gram_form_on_the_cpu():
    skip_unless_served("cpu", torch.float32)
    x, g = make((1, 5, 40, 60), torch.float32, 3)
    for form, backend in (("gram", "reference"), ("direct", "cpu")):
        with force_backend(None):
            fisher_trace(x, g, form=form)
        assert last_backend("fisher_trace") == backend
    with force_backend("cpu"), pytest.raises(UsageError, match="does not support these arguments"):
        fisher_trace(x, g, form="gram")


def test_picks_the_form_that_multiplies_less():
    for tokens, rows, columns in [(128, 4096, 4096), (2048, 4096, 14336), (512, 1024, 4096)]:
        assert gram_is_cheaper(tokens, rows, columns)
    for tokens, rows, columns in [(2048, 768, 768), (4096, 4096, 4096), (8192, 1024, 4096)]:
        assert not gram_is_cheaper(tokens, rows, columns)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_views_and_repeats_itself(backend, form):
    skip_unless_served(backend, torch.float32, form)
    x, g = make((2, 75, 70, 65), torch.float32, 4)
    spread = torch.full((2, 65, 150), float("nan"), device=x.device)
    spread[:, :, ::2] = x.transpose(1, 2)
    with force_backend(backend):
        first = fisher_trace(x, g, form=form)
        assert torch.equal(fisher_trace(x, g, form=form), first)
        assert torch.equal(fisher_trace(spread[:, :, ::2].transpose(1, 2), g, form=form), first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_cancel_never_leave_less_than_zero(backend, form):
    skip_unless_served(backend, torch.float32, form)
    x, g = make((1, 32, 6, 9), torch.float32, 5)
    x, g = torch.cat([x, x], 1) * 1e3, torch.cat([g, -g], 1)
    with force_backend(backend):
        trace = fisher_trace(x, g, form=form).item()
    scale = (x.double().norm(dim=2) * g.double().norm(dim=2)).sum().item() ** 2
    assert 0 <= trace <= 1e-6 * scale


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5)])
def test_nothing_to_sum(shape):
    assert fisher_trace(*make(shape, torch.float32, 6)).item() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, g: (x.double(), g), TypeError, "x is torch.float64"),
        (lambda x, g: (x, g.half()), TypeError, "one dtype"),
        (lambda x, g: (x, g[:, :2]), ValueError, r"\[2, 2, 5\]"),
        (lambda x, g: (x[0], g[0]), ValueError, r"needed are \[S, T, K\]"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    x, g = make((2, 3, 5, 7), torch.float32, 7)
    with pytest.raises(error, match=message):
        fisher_trace(*change(x, g))
    with pytest.raises(ValueError, match="form is 'neither'"):
        fisher_trace(x, g, form="neither")


@pytest.mark.parametrize(("name", "value"), [("x", float("nan")), ("g", float("inf"))])
def test_counts_what_is_not_finite(name, value):
    x, g = make((2, 3, 5, 7), torch.float32, 8)
    (x if name == "x" else g)[1, :2, 0] = value
    with pytest.raises(ValueError, match=rf"2 of the \d+ values of {name} are NaN or infinite"):
        fisher_trace(x, g)


def test_finite_values_whose_sum_overflows_are_no_error():
    x = torch.full((1, 4, 2), 2e38)
    assert fisher_trace(x, torch.full((1, 4, 3), 1e-30)).item() == pytest.approx(6 * (4 * 2e8) ** 2, rel=1e-5)


@pytest.mark.parametrize("gram", [False, True])
def test_is_a_well_formed_torch_op(gram):
    torch.library.opcheck(fisher_trace_op, (*make((2, 3, 5, 7), torch.float32, 9), gram))
