"""Calls of every op on fresh random inputs of odd shapes, with checks that any backend must pass.

The device tests (``test_device.py``) run each twice; the GPU check runs them under the sanitizers too. An op that is
added here is covered by both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import by_hand
import torch
from oracles import FINE, assert_product, fisher_expected, published
from torch import Tensor

from msp.formats.patterns import NMPattern
from msp.ops import (
    PackedWeight,
    _dispatch,
    fisher_diag_,
    fisher_trace,
    nm_keep,
    nm_linear,
    nm_rank,
    nm_select,
    nm_unpack,
    obs_prune,
)
from msp.ops.linear import FRAGMENTS, TILES, group_op
from msp.ops.linear.tile_order import to_tiles

Outputs = tuple[Tensor, ...]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Prepared:
    """``run`` calls the op and gives new tensors; ``check`` raises where they are not what they should be."""

    run: Callable[[], Outputs]
    check: Callable[[Outputs], None]


@dataclass(frozen=True)
class Case:
    """One op on one shape and dtype. ``large`` ones would take long in Triton's interpreter.

    ``kernels`` is the op, with the form of its weight after a dot if it is not the canonical one.
    """

    kernels: str
    name: str
    dtype: torch.dtype
    prepare: Callable[[torch.Generator, torch.dtype, torch.device], Prepared]
    large: bool = False

    @property
    def op(self) -> str:
        return self.kernels.partition(".")[0]


def every_case() -> Iterator[Case]:
    for kernels, shaped in PREPARED.items():
        for large, shapes in ((False, shaped.small), (True, shaped.large)):
            for shape in shapes:
                for label, dtype in DTYPES.items():
                    words = "-".join(map(str, shape))

                    def prepare(generator, dtype, device, shape=shape, make=shaped.make):
                        return make(generator, dtype, device, *shape)

                    yield Case(kernels, f"{label}-{words}", dtype, prepare, large)


def backends_of(kernels: str) -> tuple[str, ...]:
    """The backends that this machine can run for a weight in this form."""
    op, _, form = kernels.partition(".")
    found = _dispatch._ops[op]
    return (found.forms[form] if form else found).available()


def scaled_weight(generator, dtype, device, rows, columns):
    weight = by_hand.weights(rows, columns, dtype, generator).to(device)
    return weight, by_hand.to(device, by_hand.terms("wanda", rows, columns, generator))


def select(generator, dtype, device, rows, columns, pattern, compliant):
    pattern = NMPattern.parse(pattern)
    weight, terms = scaled_weight(generator, dtype, device, rows, columns)

    def run():
        packed = nm_select(weight, pattern, **terms, compliant=compliant)
        return packed.values, packed.bitmask

    def check(outputs):
        kept = by_hand.kept(by_hand.scores(weight, **terms), pattern.n, pattern.m, compliant)
        for found, wanted in zip(outputs, by_hand.packed(weight.cpu(), kept), strict=True):
            assert torch.equal(found.cpu(), wanted)

    return Prepared(run, check)


def rank(generator, dtype, device, rows, columns, m):
    weight, terms = scaled_weight(generator, dtype, device, rows, columns)

    def check(outputs):
        wanted = by_hand.ranks(by_hand.scores(weight, **terms), m)
        assert torch.equal(outputs[0].cpu(), torch.from_numpy(wanted))

    return Prepared(lambda: (nm_rank(weight, m, **terms),), check)


def keep(generator, dtype, device, rows, columns, m, n):
    weight = by_hand.weights(rows, columns, dtype, generator).to(device)
    ranks = torch.rand(rows, columns // m, m, generator=generator).argsort(-1).view(rows, columns).byte().to(device)

    def check(outputs):
        wanted = weight.cpu().clone()
        wanted[ranks.cpu() >= n] = 0
        assert torch.equal(outputs[0].cpu(), wanted)

    return Prepared(lambda: (nm_keep(weight, ranks, n),), check)


def unpacked(generator, dtype, device, rows, columns, pattern):
    pattern = NMPattern.parse(pattern)
    weight = by_hand.weights(rows, columns, dtype, generator)
    kept = by_hand.kept(weight.abs().double().numpy(), pattern.n, pattern.m)
    packed = PackedWeight(*by_hand.packed(weight, kept), pattern, (rows, columns)).to(device)
    wanted = weight.masked_fill(~torch.from_numpy(kept), 0.0)

    def check(outputs):
        assert torch.equal(outputs[0].cpu(), wanted)

    return Prepared(lambda: (nm_unpack(packed, out=torch.full_like(wanted, torch.nan, device=device)),), check)


def gradients(generator, dtype, device, sequences, tokens, rows, columns):
    """With a common direction, as real ones have: without it the trace's terms off the diagonal hardly count."""

    def directed(size):
        numbers = torch.randn(sequences, tokens, size, generator=generator)
        return (numbers + torch.randn(size, generator=generator)).to(device, dtype)

    return directed(columns), directed(rows)


def fisher_diagonal(generator, dtype, device, sequences, tokens, rows, columns):
    x, g = gradients(generator, dtype, device, sequences, tokens, rows, columns)
    acc = torch.rand(rows, columns, generator=generator).to(device)

    def check(outputs):
        wanted, size = fisher_expected(acc, x, g)
        assert ((outputs[0].double() - wanted).abs() <= 1e-5 * size).all()

    return Prepared(lambda: (fisher_diag_(acc.clone(), x, g),), check)


def trace(generator, dtype, device, form, sequences, tokens, rows, columns):
    x, g = gradients(generator, dtype, device, sequences, tokens, rows, columns)

    def check(outputs):
        wanted = fisher_expected(torch.zeros(rows, columns, device=device), x, g)[0].sum()
        assert abs(outputs[0].double() - wanted) <= 1e-5 * wanted

    return Prepared(lambda: (fisher_trace(x, g, form=form),), check)


def prune(generator, dtype, device, rows, columns, pattern, block):
    pattern = NMPattern.parse(pattern)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    x[:, 1:] += x[:, :-1] / 2
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().to(device)
    weight = torch.randn(rows, columns, generator=generator).to(device, dtype)

    def run():
        packed = obs_prune(weight, factor, pattern, block_size=block)
        return packed.unpack(), packed.kept()

    def check(outputs):
        wanted, kept = published(weight, factor, pattern.n, pattern.m, block)
        found, found_kept = outputs[0].double().cpu(), outputs[1].cpu()
        # two scores may be so close that rounding decides, and then the rest of the row is another
        same = (found_kept == kept).all(1)
        assert (~same).sum() <= max(1, rows // 20)
        bound = (1e-4 + FINE[dtype]) * wanted.abs() + 1e-4 * wanted.abs().mean()
        assert ((found - wanted).abs() <= bound)[same].all()
        assert (found_kept.view(rows, -1, pattern.m).sum(-1) == pattern.n).all()

    return Prepared(run, check)


def product(generator, dtype, device, tokens, rows, columns, pattern, compliant, multiply=nm_linear):
    pattern = NMPattern.parse(pattern)
    weight = torch.randn(rows, columns, generator=generator).to(device, dtype)
    packed = nm_select(weight, pattern, compliant=compliant)
    x = torch.randn(tokens, columns, generator=generator).to(device, dtype)
    bias = torch.randn(rows, generator=generator).to(device, dtype) if tokens % 2 else None

    def check(outputs):
        assert_product(outputs[0], x, packed, bias)

    return Prepared(lambda: (multiply(x, packed, bias),), check)


def on_sparse_tensor_cores(x, packed, bias):
    parts = FRAGMENTS.arrange(packed.values, packed.bitmask, packed.pattern, packed.shape[1])
    return FRAGMENTS.product(x, *parts, bias, packed.pattern, packed.shape[1])


def in_tiles(x, packed, bias):
    """An odd number of tokens finds what many need made before, as ``fast_prefill`` does."""
    weight = *to_tiles(packed.values, packed.bitmask), packed.pattern, packed.shape[1]
    compliant, kept = packed.pattern.always_compliant, None
    if x.is_cuda and x.shape[0] % 2 and x.dtype != torch.float32:
        kept = TILES.for_many_tokens(*weight, compliant)
    return TILES.product(x, *weight[:2], bias, *weight[2:], compliant, kept)


def group(generator, dtype, device, tokens, columns, *weights):
    """``weights``: rows and pattern of each in turn; every second has a bias."""
    x = torch.randn(tokens, columns, generator=generator).to(device, dtype)
    packed, biases = [], []
    for rows, pattern in zip(weights[::2], weights[1::2], strict=True):
        weight = torch.randn(rows, columns, generator=generator).to(device, dtype)
        packed.append(nm_select(weight, NMPattern.parse(pattern)))
        biases.append(None if len(biases) % 2 else torch.randn(rows, generator=generator).to(device, dtype))
    values, bitmasks = zip(*(to_tiles(one.values, one.bitmask) for one in packed), strict=True)
    n, m = ([getattr(one.pattern, name) for one in packed] for name in ("n", "m"))

    def run():
        return tuple(group_op(x, values, bitmasks, biases, n, m, columns))

    def check(outputs):
        for y, one, bias in zip(outputs, packed, biases, strict=True):
            assert_product(y, x, one, bias)

    return Prepared(run, check)


@dataclass(frozen=True)
class Shaped:
    """How a case is made, and the arguments that say its shape."""

    make: Callable[..., Prepared]
    small: list[tuple]
    large: list[tuple]


PREPARED = {
    "nm_select": Shaped(
        select,
        [
            (1, 4, "2:4", False),
            (5, 12, "1:4", False),
            (3, 40, "2:8", False),
            (7, 48, "5:16", False),
            (2, 64, "7:32", False),
            (5, 72, "4:8", True),
        ],
        [(67, 1032, "2:8", False), (33, 1032, "3:8", True), (129, 516, "2:4", False), (17, 1040, "2:16", False)],
    ),
    "nm_rank": Shaped(
        rank, [(1, 4, 4), (5, 12, 4), (3, 40, 8), (7, 48, 16), (2, 64, 32)], [(67, 1032, 8), (33, 1056, 32)]
    ),
    "nm_keep": Shaped(
        keep, [(1, 4, 4, 2), (17, 132, 4, 1), (5, 40, 8, 0), (33, 16, 16, 15)], [(67, 1032, 8, 2), (130, 4100, 4, 2)]
    ),
    "nm_unpack": Shaped(
        unpacked,
        [(1, 4, "2:4"), (17, 132, "1:4"), (5, 40, "3:8"), (33, 16, "15:16"), (2, 64, "7:32"), (3, 16, "8:8")],
        [(67, 1032, "2:8"), (130, 4100, "2:4")],
    ),
    "fisher_diag_": Shaped(
        fisher_diagonal,
        [(1, 1, 1, 1), (3, 17, 33, 20), (2, 70, 129, 66)],
        [(3, 257, 301, 130), (2, 300, 200, 520), (9, 64, 136, 264)],
    ),
    "fisher_trace": Shaped(
        trace,
        [("direct", 3, 17, 33, 20), ("gram", 3, 17, 33, 20), ("gram", 1, 131, 16, 20)],
        [("direct", 3, 257, 301, 130), ("gram", 2, 300, 200, 520), ("direct", 9, 64, 136, 264)],
    ),
    "obs_prune": Shaped(
        prune,
        [(1, 4, "2:4", 4), (7, 48, "2:8", 32), (5, 96, "5:16", 64), (3, 136, "2:8", 128)],
        [(41, 392, "2:8", 128), (130, 260, "2:4", 128), (17, 288, "9:32", 96)],
    ),
    "nm_linear": Shaped(
        product,
        [(1, 5, 12, "2:4", False), (3, 6, 40, "2:8", False), (9, 7, 72, "4:8", True), (17, 9, 48, "5:16", False)],
        [
            *((tokens, 37, 328, "2:8", False) for tokens in (1, 2, 5, 8, 16, 33, 64, 65, 130)),
            *((tokens, 129, 520, "2:4", False) for tokens in (1, 4, 17, 64, 127, 257)),
            *((tokens, 200, 1048, "4:8", True) for tokens in (1, 31, 192)),
            *((1, 301, 4104, pattern, False) for pattern in ("1:8", "3:8", "4:8", "5:8", "7:8")),
            *((3, 130, 2080, pattern, False) for pattern in ("1:4", "3:4", "1:16", "2:16", "11:32")),
            # for few tokens CUDA makes tiles of the rows, and many are multiplied from rows
            *((tokens, 144, 2816, pattern, False) for tokens in (1, 9, 257, 1025) for pattern in ("2:8", "5:8")),
        ],
    ),
    # every line of the plan, K split and whole
    "nm_linear.tiles": Shaped(
        functools.partial(product, compliant=False, multiply=in_tiles),
        [(1, 16, 256, "2:8"), (2, 48, 512, "3:16"), (9, 32, 256, "4:8")],
        [
            *((tokens, 144, 2816, "2:8") for tokens in (1, 2, 3, 8, 16, 33, 64, 67, 257, 258, 1025, 1026)),
            *((tokens, 144, 2816, "5:8") for tokens in (99, 300, 301)),
            *((tokens, 4096, 512, "4:8") for tokens in (1, 8, 32, 100)),
            *((tokens, 64, 14336, "9:16") for tokens in (1, 4, 40)),
            *((tokens, 80, 1280, pattern) for tokens in (1, 7) for pattern in ("1:8", "7:8", "1:4", "3:4", "4:32")),
        ],
    ),
    "nm_linear.group": Shaped(
        group,
        [(1, 256, 32, "2:8", 16, "1:8", 16, "3:8"), (2, 512, 16, "2:4", 48, "6:16")],
        [
            (1, 4096, 4096, "2:8", 1024, "1:8", 1024, "3:8"),
            (2, 4096, 1024, "4:8", 1024, "2:8"),
            (1, 2816, 144, "5:8", 64, "2:16", 80, "2:32", 16, "1:4"),
            *((tokens, 28672, 64, "2:8", 128, "7:8") for tokens in (1, 2)),
        ],
    ),
    # every token tile of both kernels, K split and whole, and more tiles than a GPU has multiprocessors
    "nm_linear.fragments": Shaped(
        functools.partial(product, compliant=True, multiply=on_sparse_tensor_cores),
        [(1, 5, 12, "2:4"), (3, 6, 40, "2:8"), (9, 7, 72, "4:8"), (70, 9, 48, "1:16")],
        [
            (16, 130, 2056, "2:4"),
            (64, 512, 4096, "1:4"),
            (129, 1000, 1032, "3:8"),
            (300, 4104, 520, "2:4"),
            (1031, 2056, 264, "2:8"),
            (4100, 5000, 264, "2:4"),
        ],
    ),
}
