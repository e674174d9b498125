"""``nm_linear`` from tiles beside cuBLAS: linears of Llama-2-7B, Llama-3-8B, Qwen2.5-7B and 14B, 1 to 2048 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu.runner import Context, Row, relative_error
from msp.ops import PackedWeight, nm_select
from msp.ops.layouts import to_tiles
from msp.ops.nm_linear_group import nm_linear_group
from msp.ops.nm_linear_tiles import for_many_tokens, nm_linear_tiles
from msp.patterns import NMPattern

# [out, in]
SHAPES = {
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "Llama-3-8B": [(14336, 4096), (4096, 14336), (1024, 4096)],
    "Qwen2.5-7B": [(18944, 3584), (3584, 18944), (3584, 3584)],
    "Qwen2.5-14B": [(13824, 5120), (5120, 13824), (5120, 5120)],
}
# ([out, ...], in) of linears that have one input
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


def rows(context: Context) -> Iterator[Row]:
    shapes = [shape for model in SHAPES.values() for shape in model]
    shapes = sorted(context.sizes(shapes, small=[(32, 512)]), key=lambda shape: -shape[0] * shape[1])
    # what the figures need comes first, on every shape; then the breadth, on one shape of each kind
    for shape in shapes:
        yield from one_shape(context, shape, [("2:8", 1), ("2:4", 1), ("4:8", 1), ("2:8", 16)])
    many = [(pattern, tokens) for tokens in context.sizes(MANY_TOKENS, small=[65]) for pattern in ("2:8", "5:8")]
    yield from one_shape(context, shapes[0], many, kept=not context.dry)
    for shape in dict.fromkeys((shapes[0], shapes[-1])):
        yield from one_shape(context, shape, [(pattern, 1) for pattern in ONE_TOKEN])
        yield from one_shape(context, shape, [("2:8", tokens) for tokens in FEW_TOKENS])
        yield from one_shape(context, shape, [(pattern, 8) for pattern in ("1:8", "3:8", "4:8", "2:16", "5:8")])
    yield from one_shape(context, shapes[0], many)
    for tokens in (1, 8):
        yield from one_shape(context, shapes[0], [("2:8", tokens)], torch.float16)
    for name, (outs, columns) in context.sizes(list(TOGETHER.items()), small=[("small", ((32, 16), 512))]):
        yield one_group(context, name, outs, columns)


def one_group(context: Context, name: str, outs: tuple[int, ...], columns: int) -> Row:
    """Weights of one input on one token, in one launch and in one each."""
    pattern = NMPattern.parse("2:8")
    weights = [nm_select(context.randn(out, columns), pattern) for out in outs]
    tiles = [to_tiles(one.values, one.bitmask) for one in weights]
    moved = sum(one.nbytes for one in weights)
    copies = context.rotate(lambda: [[part.clone() for part in pair] for pair in tiles], moved)
    dense = [one.unpack() for one in weights]
    dense_copies = context.rotate(lambda: [one.clone() for one in dense], sum(one.nbytes for one in dense))
    x, count = context.randn(1, columns), len(outs)
    n, m = [pattern.n] * count, [pattern.m] * count

    def together(turn: int) -> list[torch.Tensor]:
        values, bitmasks = zip(*copies[turn], strict=True)
        found: list[torch.Tensor] = nm_linear_group(x, values, bitmasks, [None] * count, n, m, columns)
        return found

    def one_by_one(turn: int) -> list[torch.Tensor]:
        return [nm_linear_tiles(x, *pair, None, pattern.n, pattern.m, columns, True) for pair in copies[turn]]

    def cublas(turn: int) -> list[torch.Tensor]:
        return [torch.nn.functional.linear(x, one) for one in dense_copies[turn]]

    with context.backend("cuda"):
        return context.row(
            f"nm_linear_group 2:8 bfloat16 1 tokens {name}",
            f"{'+'.join(map(str, outs))}x{columns}",
            together,
            {"one by one": one_by_one, "cuBLAS": cublas},
            error=relative_error(torch.cat(together(0), -1), x.double() @ torch.cat(dense).double().T),
            bound=BOUND,
            moved=moved + (columns + sum(outs)) * 2,
            flops=2 * sum(outs) * columns * pattern.n // pattern.m,
            turns=len(copies),
        )


def one_shape(
    context: Context,
    shape: tuple[int, int],
    cases: list[tuple[str, int]],
    dtype: torch.dtype = torch.bfloat16,
    kept: bool = False,
) -> Iterator[Row]:
    out, columns = shape
    dense = context.randn(out, columns, dtype=dtype)
    dense_copies = context.rotate(dense.clone, dense.nbytes)
    for text, tokens in cases:
        packed = nm_select(dense, NMPattern.parse(text))
        yield one_row(context, packed, dense_copies, text, tokens, kept)


def one_row(context: Context, packed: PackedWeight, dense_copies: object, text: str, tokens: int, kept: bool) -> Row:
    """``kept``: with what ``msp.fast_prefill`` keeps."""
    (out, columns), pattern = packed.shape, packed.pattern
    x, bias = context.randn(tokens, columns, dtype=packed.dtype), context.randn(out, dtype=packed.dtype)
    tiles = to_tiles(packed.values, packed.bitmask)
    copies = context.rotate(lambda: [part.clone() for part in tiles], packed.nbytes)
    always = pattern.always_compliant
    many = [for_many_tokens(*copy, columns, pattern, always) if kept else None for copy in copies.items]

    def ours(turn: int) -> torch.Tensor:
        values, bitmask = copies[turn]
        more = many[turn % len(many)]
        y: torch.Tensor = nm_linear_tiles(x, values, bitmask, bias, pattern.n, pattern.m, columns, always, more)
        return y

    def cublas(turn: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, dense_copies[turn], bias)  # type: ignore[index]

    wanted = x.double() @ packed.unpack().double().T + bias.double()
    with context.backend("cuda"):
        return context.row(
            f"nm_linear {text} {str(packed.dtype).removeprefix('torch.')} {tokens} tokens{', kept' if kept else ''}",
            f"{out}x{columns}",
            ours,
            {"cuBLAS": cublas},
            error=relative_error(ours(0), wanted),
            bound=BOUND,
            moved=packed.nbytes + (tokens * (columns + out) + out) * 2,
            flops=2 * tokens * out * columns * pattern.n // pattern.m,
            turns=len(copies),
            figures=figures(pattern, tokens, out * columns, kept),
        )


def figures(pattern: NMPattern, tokens: int, weights: int, kept: bool) -> tuple[str, ...]:
    """The figures that a row counts for."""
    large, text = weights >= LARGE, str(pattern)
    named = {
        "linear-2:8": tokens == 1 and text == "2:8" and large,
        "linear-half": tokens == 1 and text in ("2:4", "4:8") and large,
        "linear-bandwidth": tokens == 1 and pattern.m == 8,
        "linear-16-tokens": tokens == 16 and text == "2:8",
        "linear-many-tokens": kept,
    }
    return tuple(name for name, counts in named.items() if counts)
