"""``nm_select``, ``nm_rank`` and ``nm_keep``, compared with the usual code in torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpu.runner import Context, Measured, Missing, Planned, Rotation
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, nm_keep, nm_rank, nm_select
from msp.ops.nm_select import launch
from msp.ops.scoring import Terms, score

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOPK_ELSEWHERE = Missing("beside wanda 2:8 bf16 only")


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
    """The distance of the scores of the kept weights from the best possible; ties do not change it."""
    scores = score(weight, terms).view(len(weight), -1, pattern.m)
    # topk takes many times as long as sort for such small slices
    best = scores.sort(dim=-1, descending=True).values[..., : pattern.n].sum(dtype=torch.float64)
    return float((best - (scores * kept.view_as(scores)).sum(dtype=torch.float64)).abs() / best)


def select(context: Context, weights: Rotation[Tensor], name: str, pattern: NMPattern) -> Measured:
    # once for a shape: with millions of small slices torch's version takes as long as many rows
    alike = (name, str(pattern), weights[0].dtype) == ("wanda", "2:8", torch.bfloat16)
    given = scorings(context, *weights[0].shape)[name]
    terms = Terms(**given)

    def op(turn: int) -> PackedWeight:
        return nm_select(weights[turn], pattern, **given)

    with context.backend("cuda"):
        packed = op(0)
        return context.measure(
            # without the wait for its result about NaN
            op if context.dry else lambda turn: launch(weights[turn], terms, pattern.n, pattern.m, False),
            {"torch topk": (lambda turn: topk(weights[turn], terms, pattern)) if alike else TOPK_ELSEWHERE},
            error=kept_less(weights[0], terms, pattern, packed.kept()),
            bound=1e-12,
            moved=weights[0].nbytes + sum(term.nbytes for term in given.values()) + packed.nbytes,
            turns=len(weights),
        )


def rank(context: Context, weights: Rotation[Tensor], m: int) -> Measured:
    given = scorings(context, *weights[0].shape)["wanda"]

    def argsort(turn: int) -> Tensor:
        scores = score(weights[turn], Terms(**given))
        order = scores.view(len(scores), -1, m).argsort(dim=-1, descending=True, stable=True)
        return order.argsort(dim=-1).to(torch.uint8).view_as(scores)

    with context.backend("triton"):
        found = nm_rank(weights[0], m, **given)
        return context.measure(
            lambda turn: nm_rank(weights[turn], m, **given),
            {"torch argsort": argsort},
            error=float((found != argsort(0)).double().mean()),
            bound=0.0,
            moved=weights[0].nbytes + found.nbytes,
            turns=len(weights),
            graph=False,
        )


def keep(context: Context, weights: Rotation[Tensor]) -> Measured:
    ranks = Rotation([nm_rank(weight, 8) for weight in weights.items])
    out, zero = torch.empty_like(weights[0]), torch.zeros((), dtype=weights[0].dtype, device=context.device)

    def where(turn: int) -> Tensor:
        return torch.where(ranks[turn] < 2, weights[turn], zero)

    with context.backend("triton"):
        nm_keep(weights[0], ranks[0], 2, out=out)
        return context.measure(
            lambda turn: nm_keep(weights[turn], ranks[turn], 2, out=out),
            {"torch where": where},
            error=float((out != where(0)).double().mean()),
            bound=0.0,
            moved=2 * out.nbytes + ranks[0].nbytes,
            turns=len(weights),
        )


def rows(context: Context) -> Iterator[Planned]:
    @functools.lru_cache(1)
    def weights(shape: tuple[int, int], dtype: str) -> Rotation[Tensor]:
        return context.rotate(functools.partial(context.randn, *shape, dtype=DTYPES[dtype]), shape[0] * shape[1])

    def planned(name: str, shape: tuple[int, int], dtype: str, measure: Any, *more: Any, figures: Any = ()) -> Planned:
        def now() -> Measured:
            found: Measured = measure(context, weights(shape, dtype), *more)
            return found

        return Planned(f"{name} {dtype}", "x".join(map(str, shape)), now, figures)

    for shape in context.sizes([(8192, 8192), (11008, 16384)], small=[(64, 64)]):
        for dtype, patterns in (("bf16", ("2:8", "2:4", "4:16", "8:32")), ("fp32", ("2:8",))):
            figures = ("select-bandwidth",) if dtype == "bf16" else ()
            for text in patterns:
                for name in ("magnitude", "wanda", "ria", "fisher", "given"):
                    pattern = NMPattern.parse(text)
                    yield planned(f"nm_select {name} {text}", shape, dtype, select, name, pattern, figures=figures)
        for m in (4, 8, 16, 32):
            yield planned(f"nm_rank wanda {m}", shape, "bf16", rank, m)
        yield planned("nm_keep 2:8", shape, "bf16", keep)
