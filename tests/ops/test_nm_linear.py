from __future__ import annotations

import by_hand
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_product

from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, force_backend, last_backend, nm_linear, nm_select
from msp.ops.linear.rows import inference_op, nm_linear_op

BACKENDS = ["reference", "triton", "cpu"]
# rows, columns, pattern: one row, half a byte at the end, more groups than a program takes at once
CASES = [
    (1, 4, "1:4"),
    (5, 12, "2:4"),
    (6, 40, "2:8"),
    (7, 1040, "2:8"),
    (3, 24, "7:8"),
    (9, 48, "5:16"),
    (2, 96, "3:32"),
    (2, 64, "32:32"),
]
# Triton's skinny kernel serves up to 16 tokens, 8 at a time; on a CPU they go by 4, 2 and 1, or 64 in tiles of 16
TOKENS = [1, 3, 9, 8, 17, 16, 65]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(rows, columns, pattern, dtype, device, seed=0):
    pattern = NMPattern.parse(pattern) if isinstance(pattern, str) else pattern
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(device, dtype)
    bias = torch.randn(rows, generator=generator).to(device, dtype)
    return nm_select(weight, pattern), bias, generator


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_product_with_the_unpacked_weight(backend, dtype, case, device):
    by_hand.need("nm_linear", backend, device)
    packed, bias, generator = make(*case, dtype, device)
    for index, tokens in enumerate(TOKENS if dtype == torch.float32 else TOKENS[::2]):
        x = torch.randn(tokens, packed.shape[1], generator=generator).to(device, dtype)
        chosen = bias if index % 2 else None
        with force_backend(backend):
            y = nm_linear(x, packed, chosen)
        assert last_backend("nm_linear") == backend
        assert_product(y, x, packed, chosen)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_n_keeps_its_columns(backend, n, device):
    """Powers of two as activations: the sum of ones and zeros spells out which columns were read."""
    by_hand.need("nm_linear", backend, device)
    packed, _, _ = make(11, 16, NMPattern(n, 8), torch.float32, device, seed=n)
    packed = PackedWeight(torch.ones_like(packed.values), packed.bitmask, packed.pattern, packed.shape)
    x = 2.0 ** torch.arange(16, device=device)
    with force_backend(backend):
        y = nm_linear(x, packed)
    spelled = (y.long()[:, None] >> torch.arange(16, device=device)) & 1
    assert torch.equal(spelled.bool(), packed.kept())


@pytest.mark.parametrize("backend", BACKENDS)
def test_finds_the_sign_bit_of_a_group_of_32(backend, device):
    by_hand.need("nm_linear", backend, device)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, [0, 31, 32, 63]] = True
    weight = torch.arange(1.0, 129.0).view(2, 64)
    packed = PackedWeight.from_mask(weight, mask, NMPattern(2, 32)).to(device)
    x = torch.arange(64.0, device=device) + 1
    with force_backend(backend):
        y = nm_linear(x, packed)
    assert y.tolist() == [sum(weight[r, c].item() * (c + 1) for c in (0, 31, 32, 63)) for r in range(2)]


def test_reference_equals_a_dense_linear_to_the_bit():
    for shape, pattern in (((33, 72), "2:8"), ((8, 64), "8:8"), ((16, 32), "3:16")):
        packed, bias, generator = make(*shape, pattern, torch.float32, "cpu", seed=3)
        for lead in ((), (1,), (5,), (2, 9)):
            x = torch.randn(*lead, shape[1], generator=generator)
            with force_backend("reference"):
                assert torch.equal(nm_linear(x, packed, bias), F.linear(x, packed.unpack(), bias))
                assert torch.equal(nm_linear(x, packed), F.linear(x, packed.unpack()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_any_leading_shape_and_strides(backend, device):
    by_hand.need("nm_linear", backend, device)
    packed, bias, generator = make(5, 24, "2:8", torch.float32, device)
    wide = torch.randn(24, 2, 6, 4, generator=generator).to(device)
    for x in (
        wide[:, 0, 0, 0],
        wide.permute(1, 2, 3, 0),
        wide.permute(2, 1, 3, 0)[:, :, ::2],
        wide[:, 0, :3, 0].t(),
        wide[:, :1, :1, :1].permute(1, 2, 3, 0).expand(3, 2, 1, 24),
    ):
        with force_backend(backend):
            y = nm_linear(x, packed, bias)
        assert_product(y, x, packed, bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens_give_zero_rows(backend, device):
    by_hand.need("nm_linear", backend, device)
    packed, bias, _ = make(5, 24, "2:8", torch.float16, device)
    with force_backend(backend):
        y = nm_linear(torch.empty(2, 0, 24, dtype=torch.float16, device=device), packed, bias)
    assert y.shape == (2, 0, 5) and y.dtype == torch.float16


@pytest.mark.parametrize("m", [4, 8, 32])
def test_an_empty_weight_gives_the_bias(m, device):
    packed, bias, generator = make(3, 32, NMPattern(0, m), torch.bfloat16, device)
    x = torch.randn(2, 7, 32, generator=generator).to(device, torch.bfloat16).requires_grad_()
    assert torch.equal(nm_linear(x, packed, bias), bias.expand(2, 7, 3))
    y = nm_linear(x, packed)
    assert torch.equal(y, torch.zeros(2, 7, 3, device=device, dtype=torch.bfloat16))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["2:8", "1:4", "8:8"])
def test_gradients_are_those_of_the_masked_dense_linear(pattern, backend, device):
    by_hand.need("nm_linear", backend, device)
    packed, bias, generator = make(6, 24, pattern, torch.float32, device)
    x = torch.randn(2, 3, 24, generator=generator).to(device)
    weight = packed.unpack().requires_grad_()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, packed.values, bias)]
    trained = PackedWeight(leaves[1], packed.bitmask, packed.pattern, packed.shape)
    with force_backend(backend):
        y = nm_linear(leaves[0], trained, leaves[2])
    dense = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    expected = F.linear(dense[0], weight, dense[1])
    upstream = torch.randn(y.shape, generator=generator).to(device)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(leaves[0].grad, dense[0].grad)
    torch.testing.assert_close(leaves[1].grad, weight.grad[packed.kept()].view(packed.values.shape))
    torch.testing.assert_close(leaves[2].grad, dense[1].grad)


def test_gradients_reach_only_what_asks_for_them():
    packed, bias, _ = make(6, 24, "2:8", torch.float32, "cpu")
    bias.requires_grad_()
    x = torch.randn(4, 24)
    nm_linear(x, packed, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 4.0))
    assert packed.values.grad is None and x.grad is None
    assert not nm_linear(x, packed).requires_grad


def test_keeps_no_activation_where_only_x_is_trained():
    packed, _, _ = make(6, 24, "2:8", torch.float32, "cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        nm_linear(torch.randn(4, 24, requires_grad=True), packed)
    assert saved and all(tensor.shape in (packed.values.shape, packed.bitmask.shape) for tensor in saved)


@pytest.mark.parametrize("pattern", ["2:8", "0:8"])
def test_compiles_without_a_graph_break(pattern):
    packed, bias, generator = make(6, 24, pattern, torch.float32, "cpu")

    def layer(x):
        return torch.relu(nm_linear(x.sin(), packed, bias))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        x = torch.randn(2, tokens, 24, generator=generator)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = compiled(ours), layer(theirs)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_compiler_that_gave_up_on_the_caller_leaves_the_op_alone():
    packed, bias, _ = make(6, 24, "2:8", torch.float32, "cpu")

    def caller(x):
        try:
            torch._dynamo.graph_break()
            return nm_linear_op(x, packed.values, packed.bitmask, bias, 2, 8, 24)
        finally:
            pass

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(3, 24)
    assert torch.equal(torch.compile(caller, backend="aot_eager")(x), caller(x))
    assert not torch._dynamo.utils.counters["graph_break"] and not torch._dynamo.utils.counters["stats"]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"x has shape \[3, 16\], but its last dimension must be 24", {"x": torch.zeros(3, 16)}),
        (ValueError, r"x has shape \[\], but its last dimension must be 24", {"x": torch.zeros(())}),
        (
            TypeError,
            r"x is torch\.bfloat16, but the packed values are torch\.float32",
            {"x": torch.zeros(24).bfloat16()},
        ),
        (ValueError, "x is on meta, but the packed values are on cpu", {"x": torch.zeros(24, device="meta")}),
        (ValueError, r"bias has shape \[24\], but must have \[6\]", {"bias": torch.zeros(24)}),
        (TypeError, r"bias is torch\.float16", {"bias": torch.zeros(6).half()}),
        (ValueError, "bias is on meta", {"bias": torch.zeros(6, device="meta")}),
    ],
)
def test_refuses_what_does_not_fit(error, message, change):
    packed, _, _ = make(6, 24, "2:8", torch.float32, "cpu")
    with pytest.raises(error, match=message):
        nm_linear(**({"x": torch.zeros(3, 24), "packed": packed, "bias": None} | change))


@pytest.mark.parametrize("pattern", ["2:8", "0:8", "8:8"])
def test_is_a_well_formed_torch_op(pattern):
    packed, bias, _ = make(6, 24, pattern, torch.float32, "cpu")
    n, m = packed.pattern.n, packed.pattern.m
    x = torch.randn(2, 3, 24, requires_grad=True)
    torch.library.opcheck(nm_linear_op, (x, packed.values, packed.bitmask, bias, n, m, 24))
    trained = packed.values.clone().requires_grad_()
    torch.library.opcheck(nm_linear_op, (x, trained, packed.bitmask, bias.requires_grad_(), n, m, 24))
    with torch.no_grad():
        torch.library.opcheck(inference_op, (x.detach(), packed.values, packed.bitmask, bias.detach(), n, m, 24))


@pytest.mark.parametrize("which", [nm_linear_op, inference_op], ids=str)
def test_the_op_itself_refuses_parts_of_another_shape(which):
    packed, bias, _ = make(6, 24, "2:8", torch.float32, "cpu")
    values, bitmask = packed.values, packed.bitmask
    for wrong in ((values[:, :5], bitmask), (values, bitmask[:, :2]), (values, bitmask[:5]), (values[:5], bitmask)):
        with pytest.raises(ValueError, match=r"2:8 needs \[\d, 6\] and \[\d, 3\]"):
            which(torch.zeros(3, 24), *wrong, None, 2, 8, 24)
    with pytest.raises(ValueError, match="bias has shape"):
        which(torch.zeros(3, 24), values, bitmask, bias[:5], 2, 8, 24)
    with pytest.raises(ValueError, match=r"x has shape \[3, 16\]"):
        which(torch.zeros(3, 16, device="meta"), values.to("meta"), bitmask.to("meta"), None, 2, 8, 24)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("row", "byte", "wrong"), [(0, 0, 0b0000_0111), (5, 2, 0), (3, 1, 0xFF)])
def test_refuses_a_bitmask_that_keeps_another_number(row, byte, wrong, backend, device):
    by_hand.need("nm_linear", backend, device)
    packed, _, _ = make(6, 24, "2:8", torch.float32, device)
    packed.bitmask[row, byte] = wrong
    with force_backend(backend), pytest.raises(MspError, match=f"first in row {row}, group {byte}"):
        nm_linear(torch.zeros(1, 24, device=device), packed)


def test_without_gradients_the_op_that_autograd_does_not_know_serves():
    packed, bias, _ = make(6, 24, "2:8", torch.float32, "cpu")
    x = torch.randn(4, 24, requires_grad=True)

    def served(x, bias):
        with torch.profiler.profile() as profile:
            nm_linear(x, packed, bias)
        return {event.name for event in profile.events() if event.name.startswith("msp::")}

    assert served(x, bias) == served(x.detach(), bias.clone().requires_grad_()) == {"msp::nm_linear"}
    assert served(x.detach(), bias) == {"msp::nm_linear_inference"}
    with torch.no_grad():
        assert served(x, bias) == {"msp::nm_linear_inference"}


def test_triton_unpacks_what_was_packed(device):
    by_hand.need("nm_linear", "triton", device)
    from msp.triton_kernels import nm_linear as kernels

    for rows, columns, pattern, dtype in (
        (5, 12, "2:4", torch.bfloat16),
        (37, 40, "3:8", torch.float32),
        (3, 48, "1:16", torch.float16),
        (2, 64, "31:32", torch.bfloat16),
    ):
        packed, _, _ = make(rows, columns, pattern, dtype, device, seed=rows)
        buffer = torch.full((rows * columns + 32,), torch.nan, dtype=dtype, device=device)
        dense = buffer[16:-16].view(rows, columns)
        kernels.unpack(packed.values, packed.bitmask, dense, n=packed.pattern.n, group_size=packed.pattern.m)
        assert torch.equal(dense, packed.unpack())
        assert buffer[:16].isnan().all() and buffer[-16:].isnan().all()
