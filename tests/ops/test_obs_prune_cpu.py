"""The C++ kernel of obs_prune on every instruction set, held against the reference and a sweep in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from oracles import sweep_inputs

from msp.formats.patterns import NMPattern
from msp.ops import obs_prune
from msp.ops._compiled import compiled_module
from msp.ops.obs_prune import op as dispatched
from msp.ops.obs_prune import reference

pytest.importorskip("msp._cpu", reason="the compiled module msp._cpu is not built")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
make = functools.partial(sweep_inputs, device="cpu")


def unblocked(weight, factor, kept):
    """The sweep in float64, one column after another, with the choice given."""
    w, u = weight.double(), factor.double()
    for i in range(w.shape[1]):
        error = torch.where(kept[:, i], 0.0, w[:, i]) / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    return w.masked_fill(~kept, 0.0)


# One row, one group, tiles and panels that are partly filled, blocks that end inside a vector, several of all
SHAPES = [(1, 4), (1, 32), (2, 128), (5, 132), (17, 192), (95, 260), (96, 160), (103, 388), (200, 64), (307, 328)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_keeps_what_the_reference_keeps(isa, m, shape):
    rows, columns = shape[0], -(-shape[1] // m) * m
    for n in (m // 4, m - 1):
        weight, factor = make(rows, columns, torch.float32, seed=rows * columns + n)
        updated, kept = dispatched(weight, factor, n, m, 128)
        assert dispatched.last() == "cpu"
        assert (kept.view(rows, -1, m).sum(-1) == n).all()
        assert (updated[~kept] == 0).all() and not torch.signbit(updated[~kept]).any()
        # one other order of operations may choose otherwise where two scores are all but equal
        same = (kept == reference(weight, factor, n, m, 128)[1]).all(1)
        assert same.double().mean() >= (0.97 if rows > 50 else 1.0)
        want = unblocked(weight, factor, kept)
        scale = want.abs().mean()
        assert ((updated - want).abs() <= 1e-4 * want.abs() + 1e-5 * scale).all()


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_every_level(isa, m):
    for n in range(m + 1):
        weight, factor = make(19, 160, torch.float32, n)
        kept = dispatched(weight, factor, n, m, 128)[1]
        assert torch.equal(kept, reference(weight, factor, n, m, 128)[1])


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_ties_go_to_the_lower_column(isa, m):
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


def test_neither_threads_nor_blocks_nor_strides_change_a_bit(isa):
    weight, factor = make(307, 392, torch.float32, 7)
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
    wide = torch.full((307, 500), torch.nan)
    wide[:, 50:442] = weight
    assert torch.equal(dispatched(wide[:, 50:442], factor, 3, 8, 128)[0], want)
    for rows in (1, 6, 97):
        assert torch.equal(dispatched(weight[:rows], factor, 3, 8, 128)[0], want[:rows])


def test_vector_paths_agree_to_the_bit(monkeypatch):
    weight, factor = make(103, 268, torch.float32, 8)
    found = []
    for name in ("avx2", "avx512"):
        monkeypatch.setenv("MSP_ISA", name)
        try:
            compiled_module("msp._cpu").isa()
        except RuntimeError as error:
            pytest.skip(str(error))
        found.append(dispatched(weight, factor, 1, 4, 128))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_reads_nothing_below_the_diagonal(isa):
    weight, factor = make(40, 264, torch.float32, 9)
    below = torch.full_like(factor, torch.nan).tril(-1)
    noisy = torch.where(below.isnan(), below, factor)
    want, found = (obs_prune(weight, u, NMPattern(2, 8)) for u in (factor, noisy))
    assert torch.equal(found.bitmask, want.bitmask) and torch.equal(found.values, want.values)


def test_keeps_what_overflows_so_that_it_is_seen(isa):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packs_kept_zeros(isa, dtype):
    weight = torch.zeros(5, 32, dtype=dtype)
    weight[:, 3] = 1.0
    packed = obs_prune(weight, torch.eye(32), NMPattern(2, 8))
    packed.check()
    assert packed.kept()[0].nonzero()[:, 0].tolist() == [0, 3, 8, 9, 16, 17, 24, 25]
    assert torch.equal(packed.unpack(), weight)


def call(weight, factor, updated, kept, group_size=8, n=2, rows=None, columns=None, threads=2):
    tensors = {"weight_ptr": weight, "factor_ptr": factor, "updated_ptr": updated, "kept_ptr": kept}
    pointers = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    rows, columns = (given or size for given, size in zip((rows, columns), weight.shape, strict=True))
    sizes = {"rows": rows, "columns": columns, "group_size": group_size, "n": n, "threads": threads}
    compiled_module("msp._cpu").obs_prune(**pointers, **sizes)


def test_writes_only_its_outputs(isa):
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
def test_refuses_wrong_arguments(change, message):
    weight, factor = make(3, 40, torch.float32, 11)
    arguments = {
        "factor": factor.contiguous(),
        "updated": torch.empty(120),
        "kept": torch.empty(120, dtype=torch.bool),
    } | change
    with pytest.raises(ValueError, match=message):
        call(weight, **arguments)
