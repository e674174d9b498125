"""The rank of every weight inside its group, one byte each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .groups import (
    CHUNK,
    device_of,
    grid,
    load_and_score,
    locate,
    rank_chunk,
    scoring_case,
    split_chunks,
    unit_columns,
)
from .targets import CompileCase


@triton.jit
def nm_rank_kernel(
    weight_ptr,
    rank_ptr,
    column_scale_ptr,
    row_term_ptr,
    column_term_ptr,
    matrix_ptr,
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
        weight_ptr,
        row,
        first_column,
        live,
        columns,
        stride_row,
        stride_column,
        column_scale_ptr,
        row_term_ptr,
        column_term_ptr,
        matrix_ptr,
        UNIT,
        GROUP,
        KIND,
    )
    others = split_chunks(scores)
    start = row.to(tl.int64) * columns + first_column
    for i in tl.static_range(UNIT // CHUNK):
        place = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        rank = rank_chunk(scores[i], others, i * CHUNK, GROUP)
        live_columns = live[:, None] & (first_column[:, None] + place < columns)
        tl.store(rank_ptr + start[:, None] + place, rank.to(tl.uint8), mask=live_columns)


def nm_rank(
    weight: torch.Tensor,
    rank: torch.Tensor,
    *,
    group_size: int,
    kind: int,
    column_scale: torch.Tensor | None = None,
    row_term: torch.Tensor | None = None,
    column_term: torch.Tensor | None = None,
    matrix: torch.Tensor | None = None,
) -> None:
    """Fill ``rank [R, K]`` uint8 from ``weight [R, K]`` (any strides).

    ``kind`` numbers the score as in ``groups.score_chunk``; the terms are fp32 and contiguous.
    """
    rows, columns = weight.shape
    with device_of(weight):
        nm_rank_kernel[grid(rows, columns, group_size)](
            weight,
            rank,
            column_scale,
            row_term,
            column_term,
            matrix,
            rows,
            columns,
            weight.stride(0),
            weight.stride(1),
            GROUP=group_size,
            UNIT=unit_columns(group_size),
            KIND=kind,
            num_warps=4,
        )


def compile_cases() -> Iterator[CompileCase]:
    for dtype, group_size, kind in (("bf16", 8, 0), ("fp32", 4, 4), ("bf16", 32, 0)):
        yield scoring_case(nm_rank_kernel, dtype, group_size, kind, types={"rank_ptr": "*u8"}, constants={})
