"""``nm_select``, ``nm_rank`` and ``nm_keep`` beside what a user would write in torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.runner import Context, Rotation, Row
from msp.ops import PackedWeight, nm_keep, nm_rank, nm_select
from msp.ops.nm_select import launch
from msp.ops.scoring import Terms, score
from msp.patterns import NMPattern

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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


def select_row(context: Context, weights: Rotation[Tensor], name: str, pattern: NMPattern, dtype: str) -> Row:
    given = scorings(context, *weights[0].shape)[name]
    terms = Terms(**given)

    def op(turn: int) -> PackedWeight:
        return nm_select(weights[turn], pattern, **given)

    with context.backend("cuda"):
        packed = op(0)
        return context.row(
            f"nm_select {name} {pattern} {dtype}",
            "x".join(map(str, weights[0].shape)),
            # without the wait for what it says of NaN
            op if context.dry else lambda turn: launch(weights[turn], terms, pattern.n, pattern.m, False),
            {"torch topk": lambda turn: topk(weights[turn], terms, pattern)},
            error=kept_less(weights[0], terms, pattern, packed.kept()),
            bound=1e-12,
            moved=weights[0].nbytes + sum(term.nbytes for term in given.values()) + packed.nbytes,
            turns=len(weights),
            figures=("select-bandwidth",) if dtype == "bf16" else (),
        )


def rank_row(context: Context, weights: Rotation[Tensor], m: int) -> Row:
    given = scorings(context, *weights[0].shape)["wanda"]

    def argsort(turn: int) -> Tensor:
        scores = score(weights[turn], Terms(**given))
        order = scores.view(len(scores), -1, m).argsort(dim=-1, descending=True, stable=True)
        return order.argsort(dim=-1).to(torch.uint8).view_as(scores)

    with context.backend("triton"):
        rank = nm_rank(weights[0], m, **given)
        return context.row(
            f"nm_rank wanda {m} bf16",
            "x".join(map(str, weights[0].shape)),
            lambda turn: nm_rank(weights[turn], m, **given),
            {"torch argsort": argsort},
            error=float((rank != argsort(0)).double().mean()),
            bound=0.0,
            moved=weights[0].nbytes + rank.nbytes,
            turns=len(weights),
            graph=False,
        )


def keep_row(context: Context, weights: Rotation[Tensor]) -> Row:
    ranks = Rotation([nm_rank(weight, 8) for weight in weights.items])
    out, zero = torch.empty_like(weights[0]), torch.zeros((), dtype=weights[0].dtype, device=context.device)

    def where(turn: int) -> Tensor:
        return torch.where(ranks[turn] < 2, weights[turn], zero)

    with context.backend("triton"):
        nm_keep(weights[0], ranks[0], 2, out=out)
        return context.row(
            "nm_keep 2:8 bf16",
            "x".join(map(str, out.shape)),
            lambda turn: nm_keep(weights[turn], ranks[turn], 2, out=out),
            {"torch where": where},
            error=float((out != where(0)).double().mean()),
            bound=0.0,
            moved=2 * out.nbytes + ranks[0].nbytes,
            turns=len(weights),
        )


def rows(context: Context) -> Iterator[Row]:
    for shape in context.sizes([(8192, 8192), (11008, 16384)], small=[(64, 64)]):
        for dtype, patterns in (("bf16", ("2:8", "2:4", "4:16", "8:32")), ("fp32", ("2:8",))):
            weights = context.rotate(functools.partial(context.randn, *shape, dtype=DTYPES[dtype]), shape[0] * shape[1])
            for text in patterns:
                for name in ("magnitude", "wanda", "ria", "fisher", "given"):
                    yield select_row(context, weights, name, NMPattern.parse(text), dtype)
            if dtype == "bf16":
                for m in (4, 8, 16, 32):
                    yield rank_row(context, weights, m)
                yield keep_row(context, weights)
