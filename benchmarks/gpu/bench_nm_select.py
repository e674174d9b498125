"""``nm_select``, ``nm_rank`` and ``nm_keep`` beside what a user would write in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.runner import Context, Row
from msp.ops import nm_keep, nm_rank, nm_select
from msp.ops.nm_select import launch
from msp.ops.scoring import Terms, score
from msp.patterns import NMPattern

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LARGE = [(8192, 8192), (11008, 16384)]


def scorings(context: Context, rows: int, columns: int) -> dict[str, dict[str, Tensor]]:
    def positive(*shape: int) -> Tensor:
        return context.randn(*shape, dtype=torch.float32).abs() + 0.1

    return {
        "magnitude": {},
        "wanda": {"column_scale": positive(columns)},
        "ria": {"column_scale": positive(columns), "row_term": positive(rows), "column_term": positive(columns)},
        "fisher": {"importance": positive(rows, columns)},
        "given": {"scores": positive(rows, columns)},
    }


def topk(weight: Tensor, terms: Terms, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """Values and a bool mask, which need not be packed into bits."""
    groups = weight.view(len(weight), -1, pattern.m)
    best = score(weight, terms).view_as(groups).topk(pattern.n, dim=-1).indices.sort(-1).values
    return groups.gather(-1, best), torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)


def kept_less(weight: Tensor, terms: Terms, pattern: NMPattern, kept: Tensor) -> float:
    """By how much the scores of what is kept fall short of the best there are, which ties do not change."""
    scores = score(weight, terms).double().view(len(weight), -1, pattern.m)
    best = scores.topk(pattern.n, dim=-1).values.sum()
    return float((best - (scores * kept.view_as(scores)).sum()).abs() / best)


def select_rows(context: Context) -> Iterator[Row]:
    cases = [("2:8", "bf16"), ("2:4", "bf16"), ("4:16", "bf16"), ("8:32", "bf16"), ("2:8", "fp32")]
    for shape in context.sizes(LARGE, small=[(64, 64)]):
        for text, dtype_name in cases:
            pattern, dtype = NMPattern.parse(text), DTYPES[dtype_name]
            weights = context.rotate(lambda dtype=dtype: context.randn(*shape, dtype=dtype), shape[0] * shape[1])
            for name, given in scorings(context, *shape).items():
                terms = Terms(**given)
                read = sum(term.nbytes for term in given.values())
                with context.backend("cuda"):
                    packed = nm_select(weights[0], pattern, **given)

                    def kernel(turn: int, terms: Terms = terms, pattern: NMPattern = pattern) -> object:
                        return launch(weights[turn], terms, pattern.n, pattern.m, False)

                    yield context.row(
                        f"nm_select {name} {text} {dtype_name}",
                        f"{shape[0]}x{shape[1]}",
                        kernel,
                        {
                            "torch topk": lambda turn: topk(weights[turn], terms, pattern),
                            # the whole op looks at what it is given for NaN, and waits for the answer
                            "op with its checks": lambda turn: nm_select(weights[turn], pattern, **given),
                        },
                        error=kept_less(weights[0], terms, pattern, packed.kept()),
                        bound=1e-12,
                        moved=weights[0].nbytes + read + packed.nbytes,
                        turns=len(weights),
                        figures=("select-bandwidth",) if dtype_name == "bf16" else (),
                    )


def rank_rows(context: Context) -> Iterator[Row]:
    (shape,) = context.sizes([(8192, 8192)], small=[(64, 64)])
    scale = scorings(context, *shape)["wanda"]
    weights = context.rotate(lambda: context.randn(*shape), shape[0] * shape[1])
    for m in (4, 8, 16, 32):

        def argsort(turn: int, m: int = m) -> Tensor:
            scores = score(weights[turn], Terms(**scale)).view(shape[0], -1, m)
            order = scores.argsort(dim=-1, descending=True, stable=True)
            return order.argsort(dim=-1).to(torch.uint8)

        with context.backend("triton"):
            rank = nm_rank(weights[0], m, **scale)
            yield context.row(
                f"nm_rank wanda {m} bf16",
                f"{shape[0]}x{shape[1]}",
                lambda turn, m=m: nm_rank(weights[turn], m, **scale),
                {"torch argsort": argsort},
                error=float((rank != argsort(0).view_as(rank)).double().mean()),
                bound=0.0,
                moved=weights[0].nbytes + rank.nbytes,
                turns=len(weights),
                graph=False,
            )
    ranks = [nm_rank(weight, 8, **scale) for weight in weights.items]
    out, zero = torch.empty_like(weights[0]), torch.zeros((), dtype=weights[0].dtype, device=context.device)
    with context.backend("triton"):
        nm_keep(weights[0], ranks[0], 2, out=out)
        yield context.row(
            "nm_keep bf16",
            f"{shape[0]}x{shape[1]}",
            lambda turn: nm_keep(weights[turn], ranks[turn % len(ranks)], 2, out=out),
            {"torch where": lambda turn: torch.where(ranks[turn % len(ranks)] < 2, weights[turn], zero, out=out)},
            error=float((out != torch.where(ranks[0] < 2, weights[0], zero)).double().mean()),
            bound=0.0,
            moved=2 * out.nbytes + ranks[0].nbytes,
            turns=len(weights),
        )


def rows(context: Context) -> Iterator[Row]:
    yield from select_rows(context)
    yield from rank_rows(context)
