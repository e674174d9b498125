"""The rank of every weight inside its group, one byte each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .groups import CHUNK, NO_TERMS, Terms, launch, load_and_score, locate, rank_chunk, scoring_case, split_chunks
from .targets import CompileCase


@triton.jit
def nm_rank_kernel(
    weight_ptr,
    rank_ptr,
    terms,
    rows,
    columns,
    stride_row,
    stride_column,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
):
    row, first_column, _, live = locate(rows, columns, UNIT)
    _, scores = load_and_score(
        weight_ptr, terms, row, first_column, live, columns, stride_row, stride_column, UNIT, GROUP, KIND
    )
    others = split_chunks(scores)
    start = row.to(tl.int64) * columns + first_column
    for i in tl.static_range(UNIT // CHUNK):
        place = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        rank = rank_chunk(scores[i], others, i * CHUNK, GROUP)
        live_columns = live[:, None] & (first_column[:, None] + place < columns)
        tl.store(rank_ptr + start[:, None] + place, rank.to(tl.uint8), mask=live_columns)


def nm_rank(weight: torch.Tensor, rank: torch.Tensor, terms: Terms = NO_TERMS, *, group_size: int, kind: int) -> None:
    """Fill ``rank [R, K]`` uint8 from ``weight [R, K]`` (any strides); ``kind`` as in ``groups.score_chunk``."""
    launch(nm_rank_kernel, weight, rank, terms=terms, group_size=group_size, kind=kind)


def compile_cases() -> Iterator[CompileCase]:
    for dtype, group_size, kind in (("bf16", 8, 0), ("fp32", 4, 4), ("bf16", 32, 0)):
        yield scoring_case(nm_rank_kernel, dtype, group_size, kind, types={"rank_ptr": "*u8"}, constants={})
