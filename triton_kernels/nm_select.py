"""N:M selection and packing in one pass over the weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .groups import (
    CHUNK,
    NO_TERMS,
    UNITS,
    Terms,
    demote_beyond_two_of_four,
    launch,
    load_and_score,
    locate,
    rank_chunk,
    scoring_case,
    split_chunks,
    split_columns,
    unit_columns,
)
from .targets import CompileCase

WORD_DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@triton.jit(do_not_specialize=["n"])
def nm_select_kernel(
    weight_ptr,
    values_ptr,
    bitmask_ptr,
    terms,
    rows,
    columns,
    stride_row,
    stride_column,
    n,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
    COMPLIANT: tl.constexpr,
):
    row, first_column, unit, live = locate(rows, columns, UNIT)
    weights, scores = load_and_score(
        weight_ptr, terms, row, first_column, live, columns, stride_row, stride_column, UNIT, GROUP, KIND
    )
    if COMPLIANT:
        scores = demote_beyond_two_of_four(scores)
    others = split_chunks(scores)
    # every group before this unit keeps n weights, so slots need no scan over other units
    slot = row.to(tl.int64) * (columns // GROUP * n) + first_column // GROUP * n
    word = tl.zeros([UNITS], tl.int32)
    for i in tl.static_range(UNIT // CHUNK):
        kept = split_columns((rank_chunk(scores[i], others, i * CHUNK, GROUP) < n).to(tl.int32))
        weight = split_columns(weights[i])
        # column by column: a store of the whole tile would go through shared memory first
        for j in tl.static_range(CHUNK):
            keep = kept[j] * (live & (first_column + i * CHUNK + j < columns)).to(tl.int32)
            tl.store(values_ptr + slot, weight[j], mask=keep != 0)
            slot += keep
            word |= keep << (i * CHUNK + j)
    tl.store(bitmask_ptr + unit, word.to(bitmask_ptr.dtype.element_ty), mask=live)


def nm_select(
    weight: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    terms: Terms = NO_TERMS,
    *,
    n: int,
    group_size: int,
    kind: int,
    compliant: bool,
) -> None:
    """Fill ``values [R, K/M*N]`` and ``bitmask [R, ceil(K/8)]`` from ``weight [R, K]`` (any strides).

    ``kind`` numbers the score as in ``groups.score_chunk``.
    """
    words = bitmask.view(WORD_DTYPES[unit_columns(group_size)])
    launch(
        nm_select_kernel,
        weight,
        values,
        words,
        terms=terms,
        group_size=group_size,
        kind=kind,
        n=n,
        COMPLIANT=compliant,
    )


def compile_cases() -> Iterator[CompileCase]:
    for dtype, group_size, kind, compliant in (
        ("bf16", 8, 1, False),
        ("fp32", 8, 3, True),
        ("bf16", 4, 0, False),
        ("fp16", 16, 2, False),
        ("bf16", 32, 0, False),
    ):
        word = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}[WORD_DTYPES[unit_columns(group_size)]]
        yield scoring_case(
            nm_select_kernel,
            dtype,
            group_size,
            kind,
            types={"values_ptr": f"*{dtype}", "bitmask_ptr": word, "n": "i32"},
            constants={"COMPLIANT": compliant},
        )
