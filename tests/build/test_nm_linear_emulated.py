"""The CUDA kernels of ``nm_linear`` run on the CPU against float64, and the claims about their memory accesses."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import types
from collections.abc import Iterator

import emulated
import numpy as np
import pytest
import torch

from msp.errors import UsageError
from msp.formats import positions as _positions
from msp.formats.patterns import NMPattern
from msp.ops import _compiled, _dispatch, force_backend, last_backend, nm_linear, nm_select
from msp.ops.linear import TILES, group_op, tiles
from msp.ops.linear import group as group_file
from msp.ops.linear.plan import Device, plan
from msp.ops.linear.tile_order import has_tiles, to_tiles

GATHER, EXPAND = 0, 1
BANKS, BANK_BYTES = 32, 4
DTYPES = {torch.float16: 1, torch.bfloat16: 2}
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PATTERNS = [
    NMPattern(n, m) for m in (4, 8, 16, 32) for n in range(1, m) if has_tiles(NMPattern(n, m), 16, 256, torch.half)
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("nm_linear_emulated.cpp", tmp_path_factory.mktemp("nm_linear"))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that starts at a multiple of 16 bytes and ends where its memory does."""
    assert tensor.clone().data_ptr() % 16 == 0
    return tensor.clone(memory_format=torch.contiguous_format)


def check(library, pattern, form, at_once, tokens, rows, tiles, dtype, *, stripes=1, splits=1, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = 256 * tiles
    packed = nm_select(torch.randn(rows, columns, generator=generator).to(dtype), pattern)
    x = aligned(torch.randn(tokens, columns, generator=generator).to(dtype))
    offset = torch.randn(rows, generator=generator).to(dtype) if bias else None
    values, bitmask = (aligned(part) for part in to_tiles(packed.values, packed.bitmask))
    results = []
    for order in range(2):
        guard = 8
        y = torch.full((tokens * rows + 2 * guard,), torch.nan, dtype=dtype)
        partials = torch.full((splits, tokens, rows), torch.nan) if splits > 1 else None
        sizes = (tokens, rows, columns, pattern.m, pattern.n, form, at_once, stripes, splits, DTYPES[dtype])
        tensors = (x, values, bitmask, offset, y[guard:], partials)
        found = emulated.call(
            library.emulated_nm_linear,
            *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
            (ctypes.c_int * len(sizes))(*sizes),
            ctypes.c_uint64(seed + order),
        )
        assert found == ""
        assert y[:guard].isnan().all() and y[-guard:].isnan().all()
        results.append(y[guard:-guard].view(tokens, rows))
    assert torch.equal(*results), "the order in which threads run shows in the result"
    weight = packed.unpack().double()
    exact = x.double() @ weight.T + (0 if offset is None else offset.double())
    size = x.double().abs() @ weight.abs().T + (0 if offset is None else offset.double().abs())
    assert ((results[0].double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 2.0**-20 * size).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gathers_every_pattern(library, pattern) -> None:
    seed = 100 * pattern.m + pattern.n
    dtype = list(DTYPES)[pattern.n % 2]
    check(library, pattern, GATHER, 1, 1, 16, 1 + seed % 2 * 8, dtype, seed=seed)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.m <= 8 or p.n <= 4], ids=str)
def test_expands_every_pattern_that_fits(library, pattern) -> None:
    seed = 100 * pattern.m + pattern.n
    dtype = list(DTYPES)[pattern.n % 2]
    check(library, pattern, EXPAND, 8, 5, 16, 1 + seed % 2 * 8, dtype, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("form", "at_once", "tokens", "rows", "tiles", "stripes", "splits"),
    [
        (GATHER, 1, 3, 32, 3, 2, 1),
        (GATHER, 2, 3, 48, 2, 2, 2),  # a stripe that there is not, a token that there is not
        (GATHER, 4, 7, 16, 5, 1, 3),
        (GATHER, 4, 4, 160, 1, 8, 1),
        (EXPAND, 8, 8, 48, 3, 2, 1),
        (EXPAND, 16, 9, 80, 2, 4, 2),
        (EXPAND, 32, 33, 16, 3, 1, 2),
        (EXPAND, 16, 40, 144, 1, 8, 1),
    ],
)
def test_every_cut_of_the_work(library, form, at_once, tokens, rows, tiles, stripes, splits, dtype) -> None:
    for pattern, bias in ((NMPattern(2, 8), True), (NMPattern(3, 16), False)):
        check(
            library, pattern, form, at_once, tokens, rows, tiles, dtype,
            stripes=stripes, splits=splits, bias=bias, seed=tokens + rows,
        )  # fmt: skip


@contextlib.contextmanager
def device_replaced(monkeypatch, library, splits=1) -> Iterator[list[tuple[int, int, int]]]:
    """``msp._cuda`` by the emulated kernels, and what else only a device has.

    Yields the form of each launch, how many weights it was for and the splits.
    """
    launches: list[tuple[int, int, int]] = []

    forms = {"gather": GATHER, "expand": EXPAND}

    def sizes_of(weight, cut, tokens):
        cut_sizes = (forms[cut.form], cut.tokens_at_once, cut.stripes, cut.splits)
        return (tokens, weight.rows, weight.columns, weight.group_size, weight.n, *cut_sizes, weight.dtype_code)

    def linear(weight, cut, x, bias, y, partials, tokens, _):
        sizes = sizes_of(weight, cut, tokens)
        launches.append((forms[cut.form], 1, cut.splits))
        found = emulated.call(
            library.emulated_nm_linear,
            *(ctypes.c_void_p(to or None) for to in (x, weight.values_ptr, weight.bitmask_ptr, bias, y, partials)),
            (ctypes.c_int * len(sizes))(*sizes),
            ctypes.c_uint64(0),
        )
        assert found == ""

    def linear_group(own, cut, x, tokens, _):
        pointers = [to or None for weight, *rest in own for to in (weight.values_ptr, weight.bitmask_ptr, *rest)]
        sizes = [size for weight, *_ in own for size in sizes_of(weight, cut, tokens)]
        launches.append((forms[cut.form], len(own), cut.splits))
        found = emulated.call(
            library.emulated_nm_linear_group,
            ctypes.c_void_p(x),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int * len(sizes))(*sizes),
            len(own),
            ctypes.c_uint64(1),
        )
        assert found == ""

    module = types.SimpleNamespace(
        nm_linear=linear,
        nm_linear_group=linear_group,
        TiledWeight=types.SimpleNamespace,
        LinearCut=types.SimpleNamespace,
        usable=lambda: True,
    )
    # as much as a block needs that has so few columns
    shared = (100 if splits == 1 else 35) << 10
    with monkeypatch.context() as patch:
        patch.setattr(_compiled, "compiled_module", lambda name: module)
        patch.setattr(_dispatch, "cuda_serves", lambda name: hasattr(module, name))
        patch.setattr(_dispatch, "_serves_device", lambda backend, device: True)
        for file in (tiles, group_file):
            patch.setattr(file, "cuda_serves", lambda name: hasattr(module, name))
            patch.setattr(file, "device_limits", lambda device: Device(2, shared))
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
        with force_backend("cuda"):
            yield launches


@pytest.mark.parametrize(
    ("tokens", "patterns", "rows", "splits", "dtype"),
    [
        (1, ("2:8", "1:8", "3:8"), (64, 32, 32), 1, torch.bfloat16),
        (2, ("2:4", "5:16"), (16, 48), 1, torch.half),
        (1, ("2:32", "4:8", "1:16", "30:32"), (16, 16, 32, 16), 6, torch.bfloat16),
        (2, ("2:8",), (32,), 11, torch.half),
    ],
)
def test_a_group_is_each_of_its_products(library, monkeypatch, tokens, patterns, rows, splits, dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    columns = 256 * 11
    packed = [
        nm_select(torch.randn(count, columns, generator=generator).to(dtype), NMPattern.parse(pattern))
        for pattern, count in zip(patterns, rows, strict=True)
    ]
    biases = [
        torch.randn(count, generator=generator).to(dtype) if at % 2 == 0 else None for at, count in enumerate(rows)
    ]
    x = torch.randn(1, tokens, columns, generator=generator).to(dtype)
    arranged = [tuple(map(aligned, to_tiles(one.values, one.bitmask))) for one in packed]
    n, m = [one.pattern.n for one in packed], [one.pattern.m for one in packed]
    with device_replaced(monkeypatch, library, splits) as launches:
        found = group_op(x, [one[0] for one in arranged], [one[1] for one in arranged], biases, n, m, columns)
        assert launches == [(GATHER, len(patterns), splits)]
        for at, y in enumerate(found):
            alone = TILES.product(x, *arranged[at], biases[at], packed[at].pattern, columns)
            assert y.shape == (1, tokens, rows[at]) and torch.equal(y, alone)


def test_kernels_are_there_for_what_is_stated(library) -> None:
    for m, form, at_once in itertools.product((4, 8, 16, 32), (GATHER, EXPAND), (1, 2, 3, 4, 8, 16, 32, 64)):
        for n in range(1, m):
            stated, compiled = divmod(library.has(form, m, n, at_once), 2)
            assert compiled or not stated, (m, n, form, at_once)
    assert all(library.has(GATHER, p.m, p.n, 1) == 3 for p in PATTERNS)


def test_tiles_are_where_the_kernels_look(library) -> None:
    """The torch permutation against the words that the kernels' own functions name."""
    rows, columns, pattern = 32, 512, NMPattern(2, 16)
    packed = nm_select(torch.randn(rows, columns).half(), pattern)
    values, bitmask = to_tiles(packed.values, packed.bitmask)
    bitmask = bitmask.reshape(-1, 32, 4, 4)
    values = values.reshape(-1, 2, 32, 8)
    row, column = ctypes.c_int(), ctypes.c_int()
    for tile, lane, word in itertools.product(range(4), range(32), range(4)):
        library.word_place(lane, word, ctypes.byref(row), ctypes.byref(column))
        at_row, at_column = tile // 2 * 16 + row.value, tile % 2 * 256 + column.value
        assert torch.equal(bitmask[tile, lane, word], packed.bitmask[at_row, at_column // 8 : at_column // 8 + 4])
        found = values[tile, :, lane].reshape(4, 4)[word]
        assert torch.equal(found, packed.values[at_row, at_column // 8 : at_column // 8 + 4])


def wavefronts(addresses, width):
    """How often the banks must be visited: the most different words of one bank, a phase of 128 bytes at a time."""
    lanes = 128 // max(width, BANK_BYTES)
    total = 0
    for first in range(0, 32, lanes):
        words = {
            word
            for address in addresses[first : first + lanes]
            for word in range(address // BANK_BYTES, (address + width - 1) // BANK_BYTES + 1)
        }
        total += max(np.bincount([word % BANKS for word in words]))
    return total


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_a_gather_of_activations_meets_in_no_bank(library, group_size, tokens) -> None:
    """Whatever columns the lanes' masks name: at one time all lanes work on the same group of their words."""
    generator = np.random.default_rng(group_size)
    for group, token in itertools.product(range(32 // group_size), range(tokens)):
        first = group * group_size
        banks = [
            {library.gather_offset(0, token, t, column, tokens) // BANK_BYTES % BANKS
             for column in range(first, first + group_size)}
            for t in range(4)
        ]  # fmt: skip
        most = max(sum(bank in window for window in banks) for bank in range(BANKS))
        assert most == (1 if group_size <= 16 else 2)
        for _ in range(20):
            columns = first + generator.integers(0, group_size, 32)
            addresses = [library.gather_offset(0, token, lane % 4, int(columns[lane]), tokens) for lane in range(32)]
            assert wavefronts(addresses, 2) <= most


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_fragments_of_activations_meet_in_no_bank(library, tokens) -> None:
    for byte, eight in itertools.product(range(4), range(tokens // 8)):
        addresses = [library.fragment_offset(0, byte, 8 * eight + lane // 4, lane % 4, tokens) for lane in range(32)]
        assert wavefronts(addresses, 16) == 4  # 512 bytes, none twice


def test_table_lookups_meet_in_no_bank(library) -> None:
    generator = np.random.default_rng(0)
    for with_keep, width in ((0, 8), (1, 16)):
        for _ in range(50):
            masks = generator.integers(0, 256, 32)
            addresses = [library.expand_offset(int(masks[lane]), lane, with_keep) for lane in range(32)]
            assert wavefronts(addresses, width) <= 32 * width // 128
        turned = [library.expand_offset(lane, lane + 3, with_keep) for lane in range(32)]
        assert wavefronts(turned, width) == 32 * width // 128  # and how it is filled


def test_table_places_every_byte(library) -> None:
    """By what a byte permutation does, written out: four values of two bytes to four registers of two columns."""
    words = (ctypes.c_uint32 * 4)()
    for byte in range(256):
        kept = [column for column in range(8) if byte >> column & 1]
        library.expand_entry(byte, words)
        selectors = [words[i // 2] >> (i % 2 * 16) & 0xFFFF for i in range(4)]
        keep = [words[2 + i // 2] >> (i % 2 * 16) & 0xFFFF for i in range(4)]
        values = [0x100 * (2 * i + 2) + 2 * i + 1 for i in range(len(kept))]
        for pair in range(4):
            window = values[:4] if pair < 2 or len(kept) <= 4 else values[-4:]
            memory = b"".join(value.to_bytes(2, "little") for value in window).ljust(8, b"\0")
            picked = bytes(memory[selectors[pair] >> (4 * i) & 15] for i in range(4))
            cleared = bytes(a & (keep[pair] >> (8 * (i // 2)) & 0xFF) for i, a in enumerate(picked))
            for half, column in enumerate((2 * pair, 2 * pair + 1)):
                expected = values[kept.index(column)] if column in kept else 0
                assert int.from_bytes(cleared[2 * half : 2 * half + 2], "little") == expected
                if len(kept) <= 3:
                    assert int.from_bytes(picked[2 * half : 2 * half + 2], "little") == expected


@pytest.mark.parametrize(("tokens", "pattern"), [(1, "2:8"), (2, "1:16"), (6, "4:8"), (40, "2:8"), (7, "5:16")])
def test_the_op_calls_the_kernels_as_they_want_it(library, monkeypatch, tokens, pattern) -> None:
    """From torch tensors to the kernels and back, with what only a device has replaced."""
    packed = nm_select(torch.randn(96, 1024).bfloat16(), NMPattern.parse(pattern))
    bias = torch.randn(96).bfloat16()
    # not contiguous, and in memory that starts off the 16 bytes
    x = torch.randn(2 * tokens * 1024 + 1).bfloat16()[1:].view(1, 2 * tokens, 1024)[:, ::2]
    parts = to_tiles(packed.values, packed.bitmask)
    with device_replaced(monkeypatch, library) as launches:
        y = TILES.product(x, *parts, bias, packed.pattern, 1024)
        assert last_backend("nm_linear") == "cuda"
    wanted = plan(tokens, 96, 1024, packed.pattern, False, Device(2, 100 << 10))
    assert launches == [({"gather": GATHER, "expand": EXPAND}[wanted.how], 1, wanted.splits)]
    assert y.shape == (1, tokens, 96) and y.dtype == torch.bfloat16
    exact = x.double() @ packed.unpack().double().T + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2 * float(exact.std()))


def test_a_weight_in_rows_gets_tiles_once(library, monkeypatch) -> None:
    """The one name serves it too: the same bits as in tiles, one copy until the values are written to."""
    packed = nm_select(torch.randn(32, 512).half(), "2:8")
    bias, x = torch.randn(32).half(), torch.randn(1, 512).half()
    made = []
    arrange = tiles.to_tiles

    def arranging(values, bitmask):
        made.append(values.data_ptr())
        return arrange(values, bitmask)

    monkeypatch.setattr(tiles, "to_tiles", arranging)
    with device_replaced(monkeypatch, library) as launches:
        in_tiles = TILES.product(x, *arrange(packed.values, packed.bitmask), bias, packed.pattern, 512)
        for tokens in (1, 2, 5):
            several = nm_linear(x.expand(tokens, 512), packed, bias)
            assert last_backend("nm_linear") == "cuda" and several.shape == (tokens, 32)
        assert [form for form, *_ in launches] == [GATHER, GATHER, GATHER, EXPAND] and len(made) == 1
        without_bias = nm_linear(x, packed)
        assert torch.equal(nm_linear(x, packed, bias), in_tiles) and len(made) == 1
        packed.values.mul_(2)
        assert torch.equal(nm_linear(x, packed), 2 * without_bias) and len(made) == 2
        # the same bitmask with other values, at the same version, is another weight
        other = type(packed)(torch.randn_like(packed.values), packed.bitmask, packed.pattern, packed.shape)
        exact = x.double() @ other.unpack().double().T
        torch.testing.assert_close(nm_linear(x, other).double(), exact, rtol=1e-2, atol=1e-2 * float(exact.std()))
        # the copy goes with the values, though the bitmask stays
        counted = _positions.check_positions(packed.bitmask, 2, 8, 512)
        before = len(made)
        assert counted.derived["tiles"].are_of(other.values)
        # values that are trained get none, and leave that of others alone
        trained = type(packed)(other.values.clone().requires_grad_(), packed.bitmask, packed.pattern, packed.shape)
        y = nm_linear(x, trained)
        assert len(made) == before and counted.derived["tiles"].are_of(other.values)
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2 * float(exact.std()))
        del other
        assert "tiles" not in counted.derived
        # torch does not count writes in inference mode
        with torch.inference_mode():
            unseen = type(packed)(packed.values.clone(), packed.bitmask, packed.pattern, packed.shape)
            for count in (1, 2):
                nm_linear(x, unseen)
                assert len(made) == before + count and "tiles" not in counted.derived


def test_a_weight_that_does_not_lie_in_tiles_is_not_for_these_kernels(library, monkeypatch) -> None:
    for packed in (nm_select(torch.randn(32, 512), "2:8"), nm_select(torch.randn(8, 512).half(), "2:8")):
        with device_replaced(monkeypatch, library), pytest.raises(UsageError, match="does not support these arguments"):
            nm_linear(torch.randn(1, 512, dtype=packed.dtype), packed)
