"""``nm_linear`` from tiles and cuBLAS: linears of Llama-2-7B, Llama-3-8B, Qwen2.5-7B and 14B, 1 to 2048 tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.runner import Context, Measured, Planned, Rotation, relative_error
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, nm_select
from msp.ops.linear import TILES, group_op

# [out, in]
SHAPES = {
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "Llama-3-8B": [(14336, 4096), (4096, 14336), (1024, 4096)],
    "Qwen2.5-7B": [(18944, 3584), (3584, 18944), (3584, 3584)],
    "Qwen2.5-14B": [(13824, 5120), (5120, 13824), (5120, 5120)],
}
# ([out, ...], in) of linears that share an input
TOGETHER = {
    "q/k/v of Llama-2-7B": ((4096, 4096, 4096), 4096),
    "gate/up of Llama-2-7B": ((11008, 11008), 4096),
    "q/k/v of Llama-3-8B": ((4096, 1024, 1024), 4096),
}
LARGE = 14336 * 4096
ONE_TOKEN = [f"{n}:8" for n in range(1, 8)] + ["2:4", "1:4", "1:16", "2:16", "4:16", "8:16", "4:32", "8:32"]
FEW_TOKENS = [2, 4, 8, 16, 32, 64]
MANY_TOKENS = [65, 128, 512, 2048]
BOUND = 1e-2


def rows(context: Context) -> Iterator[Planned]:
    @functools.lru_cache(1)
    def weights(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Rotation[Tensor]]:
        dense = context.randn(*shape, dtype=dtype)
        return dense, context.rotate(dense.clone, dense.nbytes)

    def measure(shape: tuple[int, int], text: str, tokens: int, dtype: torch.dtype, kept: bool) -> Measured:
        dense, copies = weights(shape, dtype)
        return one_linear(context, nm_select(dense, NMPattern.parse(text)), copies, tokens, kept)

    for shape, text, tokens, dtype, kept in dict.fromkeys(cases(context)):
        name = f"nm_linear {text} {str(dtype).removeprefix('torch.')} {tokens} tokens{', kept' if kept else ''}"
        now = functools.partial(measure, shape, text, tokens, dtype, kept)
        counts = figures(NMPattern.parse(text), tokens, shape[0] * shape[1], kept) if dtype == torch.bfloat16 else ()
        yield Planned(name, "x".join(map(str, shape)), now, counts)
    for name, (outs, columns) in context.sizes(list(TOGETHER.items()), small=[("small", ((32, 16), 512))]):
        now = functools.partial(one_group, context, outs, columns)
        yield Planned(f"nm_linear_group 2:8 bfloat16 1 tokens {name}", f"{'+'.join(map(str, outs))}x{columns}", now)


def cases(context: Context) -> Iterator[tuple[tuple[int, int], str, int, torch.dtype, bool]]:
    """Shape, pattern, tokens, dtype, and whether the second form of ``msp.fast_prefill`` is kept.

    Some cases on every shape first, then all others on the largest and the smallest shape.
    """
    every = [shape for model in SHAPES.values() for shape in model]
    shapes = sorted(context.sizes(every, small=[(32, 512)]), key=lambda shape: -shape[0] * shape[1])
    half = torch.bfloat16
    for shape in shapes:
        for text, tokens in (("2:8", 1), ("2:4", 1), ("4:8", 1), ("2:8", 16)):
            yield shape, text, tokens, half, False
    for shape in (shapes[0], shapes[-1]):
        yield from ((shape, text, 1, half, False) for text in ONE_TOKEN)
        yield from ((shape, "2:8", tokens, half, False) for tokens in FEW_TOKENS)
        yield from ((shape, text, 8, half, False) for text in ("1:8", "3:8", "4:8", "2:16", "5:8"))
    for kept in (False,) if context.dry else (True, False):
        for tokens in context.sizes(MANY_TOKENS, small=[65]):
            yield from ((shapes[0], text, tokens, half, kept) for text in ("2:8", "5:8"))
    yield from ((shapes[0], "2:8", tokens, torch.float16, False) for tokens in (1, 8))


def one_group(context: Context, outs: tuple[int, ...], columns: int) -> Measured:
    """Weights with a common input on one token, in one launch and in one launch each."""
    pattern = NMPattern.parse("2:8")
    weights = [nm_select(context.randn(out, columns), pattern) for out in outs]
    tiles = [TILES.arrange(one.values, one.bitmask, pattern, columns) for one in weights]
    moved = sum(one.nbytes for one in weights)
    copies = context.rotate(lambda: [[part.clone() for part in pair] for pair in tiles], moved)
    dense = [one.unpack() for one in weights]
    dense_copies = context.rotate(lambda: [one.clone() for one in dense], sum(one.nbytes for one in dense))
    x, count = context.randn(1, columns), len(outs)
    n, m = [pattern.n] * count, [pattern.m] * count

    def together(turn: int) -> list[torch.Tensor]:
        values, bitmasks = zip(*copies[turn], strict=True)
        found: list[torch.Tensor] = group_op(x, values, bitmasks, [None] * count, n, m, columns)
        return found

    def one_by_one(turn: int) -> list[torch.Tensor]:
        return [TILES.product(x, *pair, None, pattern, columns, True) for pair in copies[turn]]

    def cublas(turn: int) -> list[torch.Tensor]:
        return [torch.nn.functional.linear(x, one) for one in dense_copies[turn]]

    with context.backend("cuda"):
        return context.measure(
            together,
            {"one by one": one_by_one, "cuBLAS": cublas},
            error=relative_error(torch.cat(together(0), -1), x.double() @ torch.cat(dense).double().T),
            bound=BOUND,
            moved=moved + (columns + sum(outs)) * 2,
            flops=2 * sum(outs) * columns * pattern.n // pattern.m,
            turns=len(copies),
        )


def one_linear(
    context: Context, packed: PackedWeight, dense_copies: Rotation[Tensor], tokens: int, kept: bool
) -> Measured:
    """``kept``: with the second form of ``msp.fast_prefill``."""
    (out, columns), pattern = packed.shape, packed.pattern
    x, bias = context.randn(tokens, columns, dtype=packed.dtype), context.randn(out, dtype=packed.dtype)
    tiles = TILES.arrange(packed.values, packed.bitmask, pattern, columns)
    copies = context.rotate(lambda: [part.clone() for part in tiles], packed.nbytes)
    always = pattern.always_compliant
    many = [TILES.for_many_tokens(*copy, pattern, columns, always) if kept else None for copy in copies.items]

    def ours(turn: int) -> torch.Tensor:
        values, bitmask = copies[turn]
        return TILES.product(x, values, bitmask, bias, pattern, columns, always, many[turn % len(many)])

    def cublas(turn: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, dense_copies[turn], bias)

    wanted = x.double() @ packed.unpack().double().T + bias.double()
    with context.backend("cuda"):
        return context.measure(
            ours,
            {"cuBLAS": cublas},
            error=relative_error(ours(0), wanted),
            bound=BOUND,
            moved=packed.nbytes + (tokens * (columns + out) + out) * 2,
            flops=2 * tokens * out * columns * pattern.n // pattern.m,
            turns=len(copies),
        )


def figures(pattern: NMPattern, tokens: int, weights: int, kept: bool) -> tuple[str, ...]:
    """The figures to which a row belongs."""
    large, text = weights >= LARGE, str(pattern)
    named = {
        "linear-2:8": tokens == 1 and text == "2:8" and large,
        "linear-half": tokens == 1 and text in ("2:4", "4:8") and large,
        "linear-bandwidth": tokens == 1 and pattern.m == 8,
        "linear-16-tokens": tokens == 16 and text == "2:8",
        "linear-many-tokens": kept,
    }
    return tuple(name for name, counts in named.items() if counts)
