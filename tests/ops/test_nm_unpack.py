from __future__ import annotations

import by_hand
import pytest
import torch

from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, force_backend, last_backend, nm_select, nm_unpack
from msp.ops.nm_unpack import nm_unpack_op

BACKENDS = ["reference", "triton", "cpu"]
CASES = [(1, 4, "2:4"), (17, 132, "1:4"), (5, 40, "3:8"), (3, 24, "7:8"), (33, 16, "15:16"), (2, 64, "9:32")]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(rows, columns, text, dtype, device, seed=0):
    """A packed weight and what it is when dense, both made bit by bit."""
    pattern = NMPattern.parse(text)
    generator = torch.Generator().manual_seed(seed)
    weight = by_hand.weights(rows, columns, dtype, generator)
    kept = by_hand.kept(torch.rand(rows, columns, generator=generator).numpy(), pattern.n, pattern.m)
    packed = PackedWeight(*by_hand.packed(weight, kept), pattern, (rows, columns)).to(device)
    return packed, weight.masked_fill(~torch.from_numpy(kept), 0.0).to(device)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_puts_every_value_in_its_place(backend, dtype, case, device):
    by_hand.need("nm_unpack", backend, device)
    packed, expected = make(*case, dtype, device, seed=case[0])
    out = torch.full_like(expected, torch.nan)
    with force_backend(backend):
        assert nm_unpack(packed, out=out) is out
        fresh = nm_unpack(packed)
    assert last_backend("nm_unpack") == backend
    assert torch.equal(out, expected) and torch.equal(fresh, expected)
    assert not torch.signbit(out[~packed.kept()]).any()


@pytest.mark.parametrize("text", ["0:8", "8:8"])
def test_empty_and_dense_are_patterns_too(text, device):
    weight = torch.randn(5, 24, device=device)
    packed = nm_select(weight, NMPattern.parse(text))
    expected = weight if text == "8:8" else torch.zeros_like(weight)
    assert torch.equal(nm_unpack(packed, out=torch.full_like(weight, torch.nan)), expected)


@pytest.mark.parametrize("stored", by_hand.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", by_hand.DTYPES, ids=str)
def test_takes_the_dtype_of_out(dtype, stored, device):
    packed, expected = make(7, 48, "3:8", stored, device)
    out = torch.full((7, 48), torch.nan, dtype=dtype, device=device)
    assert torch.equal(nm_unpack(packed, out=out), expected.to(dtype))


def test_writes_any_strides_and_reads_views(device):
    packed, expected = make(9, 24, "2:8", torch.float32, device)
    wide = torch.full((9, 48), torch.nan, device=device)
    views = (packed.values.t().contiguous().t(), packed.bitmask.repeat_interleave(2, 1)[:, ::2])
    for out in (wide[:, ::2], torch.full((24, 9), torch.nan, device=device).t(), torch.empty(9, 24, device=device)):
        assert torch.equal(nm_unpack(PackedWeight(*views, packed.pattern, packed.shape), out=out), expected)
    assert wide[:, 1::2].isnan().all()


@pytest.mark.parametrize("text", ["2:4", "3:16", "5:32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_a_bitmask_that_starts_at_an_odd_byte(backend, text, device):
    by_hand.need("nm_unpack", backend, device)
    packed, expected = make(5, 64, text, torch.float16, device)
    odd = torch.cat([packed.bitmask.new_zeros(1), packed.bitmask.flatten()])[1:].view(packed.bitmask.shape)
    with force_backend(backend):
        assert torch.equal(nm_unpack(PackedWeight(packed.values, odd, packed.pattern, packed.shape)), expected)


def test_writes_into_a_parameter():
    packed, expected = make(4, 16, "2:8", torch.float32, "cpu")
    parameter = torch.nn.Parameter(torch.zeros(4, 16))
    assert nm_unpack(packed, out=parameter) is parameter
    assert parameter.requires_grad and parameter.is_leaf
    assert torch.equal(parameter, expected)


def test_wrong_arguments_are_named():
    packed, _ = make(4, 16, "2:8", torch.float32, "cpu")
    with pytest.raises(TypeError, match=r"out is torch\.float64"):
        nm_unpack(packed, out=torch.zeros(4, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out has shape \[16, 4\], but the packed weight has \[4, 16\]"):
        nm_unpack(packed, out=torch.zeros(16, 4))
    packed.bitmask[3, 1] ^= 1
    with pytest.raises(MspError, match="in row 3, group 1"):
        nm_unpack(PackedWeight(packed.values, packed.bitmask, packed.pattern, packed.shape))
    with force_backend("cpu"), pytest.raises(UsageError, match="does not support these arguments"):
        nm_unpack(make(4, 16, "2:8", torch.float32, "cpu")[0], out=torch.zeros(16, 4).t())


def test_is_an_op_that_torch_knows():
    packed, _ = make(3, 24, "2:8", torch.float16, "cpu")
    torch.library.opcheck(nm_unpack_op, (packed.values, packed.bitmask, 2, 8, torch.empty(3, 24, dtype=torch.float16)))
