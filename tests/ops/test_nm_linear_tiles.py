"""``nm_linear`` of a weight in tiles, on the device there is; the CUDA kernels run on the CPU in ``tests/build``."""

from __future__ import annotations

import by_hand
import pytest
import torch

from msp.formats.patterns import NMPattern
from msp.ops import available_backends, force_backend, last_backend, nm_select
from msp.ops.linear import TILES, group_op
from msp.ops.linear.tile_order import to_tiles
from msp.ops.linear.tiles import tiles_op

BACKENDS = ["reference", "triton", "cuda"]
# the second has more stripes than whole blocks, the third an odd number of tiles across
SHAPES = [(16, 256), (144, 1024), (64, 2816)]
PATTERNS = ["2:8", "1:8", "3:8", "4:8", "7:8", "2:4", "3:4", "1:16", "4:16", "9:16", "2:32", "10:32"]
TOKENS = [1, 2, 3, 8, 13, 33, 64, 300]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def need(backend, device):
    by_hand.need("nm_linear", backend, device)


def make(rows, columns, pattern, dtype, device):
    weight = torch.randn(rows, columns, device=device).to(dtype)
    packed = nm_select(weight, NMPattern.parse(pattern))
    return packed, to_tiles(packed.values, packed.bitmask), torch.randn(rows, device=device).to(dtype)


def multiply(x, packed, tiles, bias, compliant=False):
    always = packed.pattern.always_compliant
    return TILES.product(x, *tiles, bias, packed.pattern, packed.shape[1], compliant or always)


def assert_product(y, x, packed, bias):
    weight, added = packed.unpack().double(), 0 if bias is None else bias.double()
    exact = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    # many tokens are left to products that round before they add the bias
    rounded = exact.abs() + (exact + added).abs()
    bound = ROUNDING[x.dtype] * rounded + 2.0**-8 * ROUNDING[x.dtype] * size
    assert ((y.double() - (exact + added)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_product_with_the_unpacked_weight(backend, pattern, dtype, device):
    need(backend, device)
    if backend == "triton" and device.type == "cpu":
        pytest.skip("interpreted kernels are tested on the canonical form")
    for index, (rows, columns) in enumerate(SHAPES):
        packed, tiles, bias = make(rows, columns, pattern, dtype, device)
        for tokens in TOKENS if backend == "cuda" else TOKENS[index :: len(SHAPES)]:
            x = torch.randn(tokens, columns, device=device).to(dtype)
            given = bias if tokens % 2 else None
            with force_backend(backend):
                y = multiply(x, packed, tiles, given)
                again = multiply(x, packed, tiles, given)
            assert last_backend("nm_linear") == backend
            assert torch.equal(y, again)
            assert_product(y.cpu(), x.cpu(), packed.to("cpu"), None if given is None else given.cpu())


def test_interpreted_triton_serves_tiles(device):
    need("triton", device)
    packed, tiles, bias = make(16, 256, "2:8", torch.float16, device)
    x = torch.randn(2, 3, 256, device=device).half()
    with force_backend("triton"):
        assert_product(multiply(x, packed, tiles, bias), x, packed, bias)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("patterns", [("2:8", "1:8", "3:8"), ("4:8", "6:16"), ("2:4",)])
def test_a_group_is_each_of_its_products_to_the_last_bit(tokens, patterns, device):
    made = [make(16 * (at + 1), 2816, pattern, torch.bfloat16, device) for at, pattern in enumerate(patterns)]
    x = torch.randn(1, tokens, 2816, device=device).bfloat16()
    n, m = ([getattr(packed.pattern, name) for packed, _, _ in made] for name in ("n", "m"))
    values, bitmasks = zip(*(tiles for _, tiles, _ in made), strict=True)
    found = group_op(x, values, bitmasks, [bias for _, _, bias in made], n, m, 2816)
    for y, (packed, tiles, bias) in zip(found, made, strict=True):
        assert torch.equal(y, multiply(x, packed, tiles, bias))


def test_a_group_that_no_launch_serves_is_refused(device):
    _, (values, bitmask), bias = make(16, 256, "2:8", torch.bfloat16, device)
    x = torch.randn(1, 256, device=device).bfloat16()
    with pytest.raises(ValueError, match="5 weights in a group: 1 to 4"):
        group_op(x, [values] * 5, [bitmask] * 5, [bias] * 5, [2] * 5, [8] * 5, 256)
    with pytest.raises(ValueError, match=r"shape \[3, 256\] has not 1 to 2 tokens"):
        group_op(x.repeat(3, 1), [values], [bitmask], [bias], [2], [8], 256)
    with pytest.raises(ValueError, match="bias"):
        group_op(x, [values], [bitmask], [bias[:5]], [2], [8], 256)


def test_zero_tokens_and_any_strides(device):
    packed, tiles, bias = make(32, 512, "2:8", torch.bfloat16, device)
    empty = multiply(torch.empty(2, 0, 512, dtype=torch.bfloat16, device=device), packed, tiles, bias)
    assert empty.shape == (2, 0, 32)
    x = torch.randn(512, 3, 2, device=device).bfloat16().permute(2, 1, 0)
    assert_product(multiply(x, packed, tiles, bias), x, packed, bias)
    expanded = torch.randn(1, 512, device=device).bfloat16().expand(4, 512)
    assert_product(multiply(expanded, packed, tiles, None), expanded, packed, None)


def test_is_a_well_formed_torch_op(device):
    _, (values, bitmask), bias = make(16, 256, "2:8", torch.bfloat16, device)
    x = torch.randn(3, 256, device=device).bfloat16().requires_grad_()
    torch.library.opcheck(tiles_op, (x, values, bitmask, bias, 2, 8, 256, True))
    group = ([values, values], [bitmask, bitmask], [bias, None], [2, 2], [8, 8], 256)
    torch.library.opcheck(group_op, (x[:1].detach(), *group))


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_runs_in_a_cuda_graph(tokens, device):
    if "cuda" not in available_backends("nm_linear"):
        pytest.skip("needs a CUDA device and msp._cuda")
    packed, tiles, bias = make(1024, 4096, "2:8", torch.bfloat16, device)
    x = torch.randn(tokens, 4096, device=device).bfloat16()
    multiply(x, packed, tiles, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(x, packed, tiles, bias)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, multiply(x, packed, tiles, bias))
        assert_product(y, x, packed, bias)
