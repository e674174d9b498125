"""``nm_select``, ``nm_rank`` and ``nm_keep`` on the CPU, compared with the usual code in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from runner import measure
from torch import Tensor

from msp.formats.patterns import NMPattern
from msp.ops import force_backend, nm_keep, nm_rank, nm_select

PATTERN = NMPattern(2, 8)
# more bytes than the last cache of any likely machine keeps between two uses
ROTATED_BYTES = 768 << 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make(size: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Enough weights that none is in a cache at its next turn, and a column scale."""
    count = ROTATED_BYTES // (size * size * dtype.itemsize)
    return [torch.randn(size, size).to(dtype) for _ in range(count)], torch.rand(size) + 0.1


def copy_of(moved: int) -> Callable[[], object]:
    """Torch's copy of half the bytes: reads and writes together move as many. Its ratio is a share of its bandwidth."""
    source = torch.ones(max(ROTATED_BYTES, 2 * moved), dtype=torch.uint8)
    target = torch.empty_like(source)
    starts = itertools.cycle(range(0, len(source) - moved // 2, moved // 2))

    def copy() -> None:
        start = next(starts)
        target[start : start + moved // 2].copy_(source[start : start + moved // 2])

    return copy


def topk(weight: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Wanda's selection in torch: the values and a bool mask, which need not be packed into bits."""
    rows, columns = weight.shape
    groups = weight.view(rows, -1, PATTERN.m)
    scores = (weight.abs().float() * column_scale).view_as(groups)
    best = scores.topk(PATTERN.n, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return groups.gather(-1, best.sort(-1).values).view(rows, -1), mask.view(rows, columns)


def compare_selection(benchmark, dtype: torch.dtype, size: int) -> None:
    weights, scale = make(size, dtype)
    with force_backend("cpu"):
        packed = nm_select(weights[0], PATTERN, column_scale=scale)
    _, mask = topk(weights[0], scale)
    # topk may take another column of equal score, so the sums of the kept scores are compared
    kept, wanted = ((weights[0].float() * scale).abs()[which].double().sum() for which in (packed.kept(), mask))
    turns = itertools.cycle(weights)
    with force_backend("cpu"):
        measure(
            benchmark,
            lambda: nm_select(next(turns), PATTERN, column_scale=scale),
            {
                "torch topk": lambda: topk(next(turns), scale),
                "copy of as many bytes": copy_of(weights[0].nbytes + packed.nbytes),
            },
            error=float(((kept - wanted) / wanted).abs()),
            bound=1e-12,
            moved=weights[0].nbytes + packed.nbytes,
        )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_select_wanda_8192(benchmark, dtype: torch.dtype) -> None:
    compare_selection(benchmark, dtype, 8192)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_isa_select_wanda_4096_bf16(benchmark, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(isa, monkeypatch)
    compare_selection(benchmark, torch.bfloat16, 4096)


def force(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("msp._cpu")
    monkeypatch.setenv("MSP_ISA", isa)
    try:
        assert native.isa() == isa
    except RuntimeError as error:
        pytest.skip(str(error))


def argsort(weight: Tensor, column_scale: Tensor, m: int) -> Tensor:
    """The rank of every weight in its group by torch's usual means: the place in the sort, inverted."""
    scores = (weight.abs().float() * column_scale).view(len(weight), -1, m)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1).to(torch.uint8).view_as(weight)


def compare_ranks(benchmark, dtype: torch.dtype, m: int) -> None:
    weights, scale = make(4096, dtype)
    with force_backend("cpu"):
        rank = nm_rank(weights[0], m, column_scale=scale)
    wrong = int((rank != argsort(weights[0], scale, m)).sum())
    turns = itertools.cycle(weights)

    def in_torch() -> None:
        with force_backend("reference"):
            nm_rank(next(turns), m, column_scale=scale)

    with force_backend("cpu"):
        measure(
            benchmark,
            lambda: nm_rank(next(turns), m, column_scale=scale),
            {
                "torch argsort": lambda: argsort(next(turns), scale, m),
                "reference": in_torch,
                "copy of as many bytes": copy_of(weights[0].nbytes + rank.nbytes),
            },
            error=wrong / rank.numel(),
            bound=0.0,
            moved=weights[0].nbytes + rank.nbytes,
        )


@pytest.mark.parametrize("m", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_rank_wanda_4096(benchmark, dtype: torch.dtype, m: int) -> None:
    compare_ranks(benchmark, dtype, m)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_isa_rank_wanda_4096_bf16(benchmark, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(isa, monkeypatch)
    compare_ranks(benchmark, torch.bfloat16, 8)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_keep_4096(benchmark, dtype: torch.dtype) -> None:
    weights, scale = make(4096, dtype)
    ranks = [nm_rank(weight, PATTERN.m, column_scale=scale) for weight in weights]
    out, zero = torch.empty_like(weights[0]), torch.zeros((), dtype=dtype)
    with force_backend("cpu"):
        nm_keep(weights[0], ranks[0], PATTERN.n, out=out)
    wrong = int((out != torch.where(ranks[0] < PATTERN.n, weights[0], zero)).sum())
    turns = itertools.cycle(zip(weights, ranks, strict=True))
    moved = 2 * out.nbytes + ranks[0].nbytes

    def where() -> None:
        weight, rank = next(turns)
        torch.where(rank < PATTERN.n, weight, zero, out=out)

    with force_backend("cpu"):
        measure(
            benchmark,
            lambda: nm_keep(*next(turns), PATTERN.n, out=out),
            {"torch where": where, "copy of as many bytes": copy_of(moved)},
            error=wrong / out.numel(),
            bound=0.0,
            moved=moved,
        )
