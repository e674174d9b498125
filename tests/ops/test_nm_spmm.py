"""The kernel nm_spmm, by which ``nm_linear`` multiplies fragments: on the GPU where there is one.

Everywhere its whole kernels are emulated on the CPU, for both chips.
"""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import emulated
import pytest
import torch

from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, _compiled, _dispatch, force_backend, last_backend, nm_linear, nm_select
from msp.ops.linear import FRAGMENTS, TILES, Size, thresholds, tiles
from msp.ops.linear import fragments as module
from msp.ops.linear import plan as plan_file
from msp.ops.linear.plan import Device, kept_bytes
from msp.ops.linear.tile_order import to_tiles

KERNELS = ["nm_spmm.cu", "nm_spmm_pack.cu", "nm_spmm_sm80.cu", "nm_spmm_sm90.cu", "nm_spmm_sum.cu"]
DTYPES = [torch.float16, torch.bfloat16]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# compute capability 8, 9; "cuda": this machine's GPU
CHIPS = [8, 9, "cuda"]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class EmulatedCuda:
    """What ``msp._cuda`` offers of nm_spmm, run on the CPU as a device of this major version would."""

    def __init__(self, library: ctypes.CDLL, major: int):
        self.library, self.major = library, major
        self.multiprocessors, self.seed = 4, 0
        for function in (library.nm_spmm_fragments, library.nm_spmm_workspace):
            function.restype = ctypes.c_int64

    def nm_spmm_fragment_bytes(self, rows, columns):
        return self.library.nm_spmm_fragments(*map(ctypes.c_int64, (rows, columns)))

    def nm_spmm_workspace_bytes(self, *shape):
        return self.library.nm_spmm_workspace(*map(ctypes.c_int64, shape), self.major, self.multiprocessors)

    def nm_spmm_pack(self, *, values_ptr, bitmask_ptr, fragments_ptr, rows, columns, group_size, n, stream):
        pointers = map(ctypes.c_void_p, (values_ptr, bitmask_ptr, fragments_ptr))
        self._call(self.library.nm_spmm_pack, *pointers, *map(ctypes.c_int64, (rows, columns)), group_size, n)

    def nm_spmm(self, *, dtype_code, tokens, rows, columns, stream, **pointers):
        x, fragments, bias, y, workspace = (
            pointers[f"{name}_ptr"] for name in ("x", "fragments", "bias", "y", "workspace")
        )
        assert x % 16 == fragments % 16 == workspace % 16 == columns % 8 == 0
        addresses = map(ctypes.c_void_p, (x, fragments, bias, y, workspace))
        shape = map(ctypes.c_int64, (tokens, rows, columns))
        self._call(self.library.nm_spmm, *addresses, dtype_code, *shape, self.major, self.multiprocessors)

    def _call(self, function, *arguments):
        self.seed += 1
        found = emulated.call(function, *arguments, ctypes.c_uint64(self.seed))
        if found:
            raise RuntimeError(found)

    def cut(self, *shape):
        """Tokens of a tile, splits of K, blocks of a cluster."""
        cut = (ctypes.c_int * 3)()
        self.library.nm_spmm_cut(*map(ctypes.c_int64, shape), self.major, self.multiprocessors, cut)
        return tuple(cut)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build("nm_spmm_emulated.cpp", tmp_path_factory.mktemp("nm_spmm"), *KERNELS)


@pytest.fixture
def emulate(library, monkeypatch):
    """``emulate(major)`` puts the emulated kernels in the place of the compiled module."""

    def emulate(major):
        chip = EmulatedCuda(library, major)
        real = _compiled.compiled_module
        monkeypatch.setattr(_compiled, "compiled_module", lambda name: chip if name == "msp._cuda" else real(name))
        monkeypatch.setattr(module, "cuda_serves", lambda name: hasattr(chip, name))
        monkeypatch.setitem(_dispatch.AUTOMATIC, "cpu", ("cuda", "cpu", "reference"))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        return chip

    return emulate


@pytest.fixture
def on(emulate):
    """``on(chip)`` returns the device to test on."""

    def on(chip):
        if chip != "cuda":
            emulate(chip)
            return torch.device("cpu")
        if "cuda" not in module.op.available():
            pytest.skip("this machine has no GPU, or msp._cuda is not built")
        return torch.device("cuda")

    return on


def make(rows, columns, pattern, dtype, seed=0, device="cpu", compliant=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(device, dtype)
    return nm_select(weight, NMPattern.parse(pattern), compliant=compliant).to(device), bias, generator


def multiply(x, packed, bias=None):
    fragments = module.pack(packed.values, packed.bitmask, packed.shape[1], packed.pattern.n, packed.pattern.m)
    y = module.multiply(x, fragments, bias, packed.shape[0])
    assert last_backend("nm_linear") == "cuda"
    return y


def assert_product(y, x, packed, bias=None):
    """Against float64: one rounding of the result, and what a float32 sum of K products may lose."""
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.T.abs() + (0 if bias is None else bias.double().abs())
    assert y.shape == expected.shape and y.dtype == x.dtype
    bound = ROUNDING[x.dtype] * expected.abs() + 16 * 2.0**-24 * size + 1e-6
    assert ((y.double() - expected).abs() <= bound).all()


# tokens, rows, columns, pattern, multiprocessors, and how that is cut on either chip
CASES = [
    ((1, 1, 8, "2:4", 4), (16, 1, 1), (64, 1, 1)),
    ((17, 130, 72, "1:4", 1), (64, 1, 1), (64, 1, 1)),
    ((70, 129, 264, "4:8", 2), (64, 1, 1), (64, 1, 2)),
    ((300, 100, 136, "2:8", 1), (128, 1, 1), (128, 1, 1)),
    ((1030, 131, 72, "3:8", 2), (128, 1, 1), (256, 1, 2)),
    ((1100, 24, 320, "1:8", 1), (128, 1, 1), (256, 1, 1)),
    ((5, 250, 2112, "2:16", 132), (16, 2, 1), (64, 2, 2)),
    ((66, 40, 4128, "1:32", 132), (64, 4, 1), (64, 4, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("chip", CHIPS)
def test_is_the_product_with_the_unpacked_weight(chip, case, on, request):
    (tokens, rows, columns, pattern, multiprocessors), *cuts = case
    device = on(chip)
    if chip != "cuda":
        emulated_chip = _compiled.compiled_module("msp._cuda")
        emulated_chip.multiprocessors = multiprocessors
        assert emulated_chip.cut(tokens, rows, columns) == cuts[chip - 8]
    index = CASES.index(case)
    # the two dtypes differ in an instruction's name only, so an emulated case takes one of them
    for dtype in DTYPES if chip == "cuda" else [DTYPES[index % 2]]:
        packed, bias, generator = make(rows, columns, pattern, dtype, index, device)
        x = torch.randn(tokens, columns, generator=generator).to(device, dtype)
        bias = bias if index % 3 else None
        assert_product(multiply(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_both_dtypes_and_y_that_cannot_be_stored_16_bytes_at_a_time(chip, dtype, on):
    device = on(chip)
    for rows in (9, 16):
        packed, bias, generator = make(rows, 72, "2:4", dtype, rows, device)
        x = torch.randn(3, 72, generator=generator).to(device, dtype)
        assert_product(multiply(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_column_meets_its_own(chip, on):
    """Single ones as activations read the weight out column by column."""
    device = on(chip)
    for pattern in ("1:4", "2:4", "4:8"):
        packed, _, _ = make(20, 80, pattern, torch.bfloat16, 5, device)
        y = multiply(torch.eye(80, device=device, dtype=torch.bfloat16), packed)
        assert torch.equal(y.T, packed.unpack())


@pytest.mark.parametrize("chip", CHIPS)
def test_splits_are_summed_the_same_way_every_time(chip, on):
    device = on(chip)
    if chip != "cuda":
        _compiled.compiled_module("msp._cuda").multiprocessors = 132
    packed, bias, generator = make(100, 2304, "2:4", torch.float16, 1, device)
    x = torch.randn(9, 2304, generator=generator).to(device, torch.float16)
    first, second = multiply(x, packed, bias), multiply(x, packed, bias)
    assert torch.equal(first, second)


@pytest.mark.parametrize("chip", CHIPS)
def test_takes_any_leading_shape_strides_and_columns(chip, on):
    device = on(chip)
    packed, bias, generator = make(12, 36, "2:4", torch.bfloat16, 2, device)
    wide = torch.randn(2, 3, 2, 36, generator=generator).to(device, torch.bfloat16)
    shifted = torch.randn(1 + 5 * 40, generator=generator).to(device, torch.bfloat16)[1:].view(5, 40)
    for x in (wide[0, 0, 0], wide, wide.permute(2, 0, 1, 3)[:, :, ::2], shifted[:, :36], wide[:, :0]):
        assert_product(multiply(x, packed, bias), x, packed, bias)
    packed, bias, _ = make(12, 40, "2:8", torch.bfloat16, 2, device)
    assert shifted.data_ptr() % 16
    assert_product(multiply(shifted, packed, bias), shifted, packed, bias)


@pytest.mark.parametrize("chip", CHIPS)
def test_not_a_number_stays_in_its_token(chip, on):
    device = on(chip)
    packed, _, generator = make(140, 136, "2:4", torch.float16, 3, device)
    x = torch.randn(67, 136, generator=generator).to(device, torch.float16)
    x[[4, 66]] = torch.nan
    y = multiply(x, packed)
    assert y[[4, 66]].isnan().all()
    rest = [token for token in range(67) if token not in (4, 66)]
    assert_product(y[rest], x[rest], packed)


def unpack_fragments(fragments, rows, columns):
    """Dense values from fragment order, lane by lane as the PTX manual (9.7.14.6.2) hands them to mma.sp.m16n8k32."""
    slabs, blocks = -(-rows // 128) * 8, -(-columns // 256) * 4
    words = fragments.view(torch.int32).view(slabs, blocks, 288)
    values = fragments.view(torch.int16).view(slabs, blocks, 576)[..., :512].view(slabs, blocks, 2, 32, 4, 2)
    dense = torch.zeros(slabs * 16, blocks * 64, dtype=torch.int16)
    for slab in range(slabs):
        for block in range(blocks):
            for step in range(2):  # a k32 instruction, its selector the same
                for row in range(16):
                    for group in range(8):
                        lane = row % 8 * 4 + 2 * step + group // 4
                        code = int(words[slab, block, 256 + lane]) >> (row // 8 * 16 + group % 4 * 4) & 15
                        assert code in (4, 8, 9, 12, 13, 14)
                        register = row // 8 + group // 4 * 2
                        pair = values[slab, block, step, row % 8 * 4 + group % 4, register]
                        column = block * 64 + step * 32 + group * 4
                        dense[slab * 16 + row, column + (code & 3)] = pair[0]
                        dense[slab * 16 + row, column + (code >> 2)] = pair[1]
    return dense


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "1:8", "2:8", "3:8", "4:8", "2:16", "7:16", "1:32", "16:32", "0:8"])
def test_fragments_hold_the_weight(pattern, emulate):
    emulate(8)
    rows, columns = 19, 96
    packed, _, _ = make(rows, columns, pattern, torch.bfloat16, len(pattern))
    fragments = module.pack(packed.values, packed.bitmask, columns, packed.pattern.n, packed.pattern.m)
    assert fragments.numel() == 128 * 256 * 9 // 8
    dense = unpack_fragments(fragments, rows, columns)
    assert torch.equal(dense[:rows, :columns], packed.unpack().view(torch.int16))
    assert not dense[rows:].any() and not dense[:, columns:].any()
    # the op's own way back, and so the layout's
    assert torch.equal(module.unpack_fragments(fragments, rows, columns, torch.bfloat16), packed.unpack())
    arranged = FRAGMENTS.arrange(packed.values, packed.bitmask, packed.pattern, columns)
    values, bitmask = FRAGMENTS.restore(*arranged, packed.pattern, columns)
    assert torch.equal(values, packed.values) and torch.equal(bitmask, packed.bitmask)


def test_rows_that_end_inside_a_byte_of_the_bitmask(emulate):
    emulate(8)
    packed, _, _ = make(5, 12, "2:4", torch.float16)
    fragments = module.pack(packed.values, packed.bitmask, 12, 2, 4)
    assert torch.equal(unpack_fragments(fragments, 5, 12)[:5, :12], packed.unpack().view(torch.int16))


def test_a_buffer_can_be_used_again(emulate):
    emulate(9)
    scratch = torch.full((module.fragment_bytes(130, 64) + 7,), 255, dtype=torch.uint8)
    for rows in (130, 20):
        packed, bias, generator = make(rows, 64, "2:8", torch.float16, rows)
        fragments = module.pack(packed.values, packed.bitmask, 64, 2, 8, out=scratch)
        assert fragments is scratch
        x = torch.randn(4, 64, generator=generator).half()
        assert_product(module.multiply(x, scratch, bias, rows), x, packed, bias)


def test_knows_which_weights_are_compliant():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 64, generator=generator)
    for pattern in ("1:4", "2:4", "2:8", "4:8", "3:16", "8:32"):
        packed = nm_select(weight, NMPattern.parse(pattern), compliant=True)
        assert module.is_compliant(packed.bitmask, packed.pattern.m)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, [0, 5, 9, 13]] = True
    assert module.is_compliant(PackedWeight.from_mask(torch.ones(3, 16), mask, NMPattern(4, 16)).bitmask, 16)
    mask[2] = torch.tensor([0] * 8 + [1, 1, 0, 1] + [0, 1, 0, 0]).bool()
    assert not module.is_compliant(PackedWeight.from_mask(torch.ones(3, 16), mask, NMPattern(4, 16)).bitmask, 16)
    with pytest.raises(ValueError, match="group size 6 is not a multiple of 4"):
        module.is_compliant(torch.zeros(1, 3, dtype=torch.uint8), 6)


def test_serves_compliant_half_precision_weights_on_a_gpu(emulate):
    emulate(8)

    def serves(pattern, dtype, compliant, device="cuda"):
        return FRAGMENTS.serves(Size(NMPattern.parse(pattern), 16, 64, dtype, torch.device(device), compliant))

    assert serves("2:8", torch.bfloat16, False) and serves("4:8", torch.float16, True)
    assert not serves("4:8", torch.float16, False) and not serves("2:8", torch.float32, True)
    assert not serves("0:8", torch.float16, True) and not serves("2:8", torch.bfloat16, False, "cpu")


def test_the_reference_multiplies_by_fragments_too(emulate):
    emulate(8)
    packed, bias, generator = make(6, 40, "2:8", torch.bfloat16)
    x = torch.randn(2, 3, 40, generator=generator).bfloat16()
    values, bitmask = FRAGMENTS.arrange(packed.values, packed.bitmask, packed.pattern, 40)
    with force_backend("reference"):
        y = FRAGMENTS.product(x, values, bitmask, bias, packed.pattern, 40)
    assert last_backend("nm_linear") == "reference"
    assert torch.equal(y, torch.nn.functional.linear(x, packed.unpack(), bias))
    assert_product(FRAGMENTS.product(x, values, bitmask, bias, packed.pattern, 40), x, packed, bias)
    assert last_backend("nm_linear") == "cuda"
    with pytest.raises(TypeError, match=r"x is torch\.float16, but the fragments are those of torch\.bfloat16"):
        FRAGMENTS.product(x.half(), values, bitmask, None, packed.pattern, 40)


def test_many_tokens_of_a_weight_in_rows_go_over_sparse_tensor_cores(emulate, monkeypatch):
    """By the one name: no tiles are made on the way."""
    emulate(9)
    monkeypatch.setattr(tiles, "device_limits", lambda device: Device(4, 228 << 10))
    monkeypatch.setattr(tiles, "cuda_serves", lambda name: True)
    monkeypatch.setattr(tiles, "to_tiles", None)
    monkeypatch.setattr(plan_file, "EXPAND_TOKENS", 8)
    monkeypatch.setattr(plan_file, "SPMM_TOKENS", 12)
    plan_file.plan.cache_clear()
    assert thresholds.SPMM_TOKENS == 1024  # what is replaced here for the sake of speed
    packed, bias, generator = make(48, 512, "2:8", torch.bfloat16)
    x = torch.randn(20, 512, generator=generator).bfloat16()
    try:
        assert_product(nm_linear(x, packed, bias), x, packed, bias)
    finally:
        plan_file.plan.cache_clear()
    assert last_backend("nm_linear") == "cuda"


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x is torch.float32", lambda f: module.multiply(torch.zeros(2, 64), f, None, 9)),
        (ValueError, r"a \[9, 512\] weight", lambda f: module.multiply(torch.zeros(2, 512).half(), f, None, 9)),
        (ValueError, "out must be 36864", lambda f: module.pack(*PARTS, 64, 2, 4, out=f[:-1])),
        (TypeError, "values are torch.float32", lambda f: module.pack(PARTS[0].float(), PARTS[1], 64, 2, 4)),
    ],
)
def test_refuses_what_does_not_fit(error, message, call, emulate):
    emulate(8)
    with pytest.raises(error, match=message):
        call(torch.zeros(36864, dtype=torch.uint8))


PARTS = torch.zeros(9, 32).half(), torch.full((9, 8), 0x33, dtype=torch.uint8)


@pytest.mark.parametrize("pattern", ["2:8", "5:8"])
def test_what_was_kept_for_many_tokens_serves_them(pattern, emulate, monkeypatch):
    emulate(9)
    monkeypatch.setattr(tiles, "device_limits", lambda device: Device(4, 228 << 10))
    monkeypatch.setattr(tiles, "cuda_serves", lambda name: True)
    packed, bias, generator = make(48, 512, pattern, torch.bfloat16, compliant=pattern == "2:8")
    parts, compliant = to_tiles(packed.values, packed.bitmask), pattern == "2:8"
    kept = TILES.for_many_tokens(*parts, packed.pattern, 512, compliant)
    assert kept.nbytes <= kept_bytes(packed.pattern, 48, 512)
    x = torch.randn(100, 512, generator=generator).bfloat16()
    y = TILES.product(x, *parts, bias, packed.pattern, 512, compliant, kept)
    assert last_backend("nm_linear") == "cuda"
    assert_product(y, x, packed, bias)
