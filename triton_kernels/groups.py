"""Common parts of the group kernels: groups held in registers, their scores and their ranks.

A *unit* is the columns whose kept bits fill whole bytes: one group, or two groups of 4. A program takes ``UNITS`` of
them, one a thread, as chunks of ``CHUNK`` columns. A chunk is a ``[UNITS, CHUNK]`` tile that one thread loads with
vector loads of 16 bytes. A thread then holds all columns of its units: splitting them off, comparing them and packing
them needs no shuffle and no shared memory (the PTX has none).
"""

# Triton's language has no starred expressions
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .targets import CompileCase

CHUNK = tl.constexpr(8)
UNITS = tl.constexpr(128)

# ``column_scale [K]``, ``row_term [R]``, ``column_term [K]`` and the matrix ``[R, K]`` of a score, fp32 and contiguous.
# A term that the kind of score does not use is None. Kernels take all four as one argument.
Terms = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NO_TERMS: Terms = (None, None, None, None)


def unit_columns(group_size: int) -> int:
    return max(group_size, 8)


def grid(rows: int, columns: int, group_size: int) -> tuple[int]:
    """Programs for a ``[rows, columns]`` weight; ``locate`` gives each program its units."""
    return (triton.cdiv(rows * triton.cdiv(columns, unit_columns(group_size)), UNITS.value),)


def device_of(tensor: torch.Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device_of(tensor)


@triton.jit
def locate(rows, columns, UNIT: tl.constexpr):
    """This program's units: row, first column, number counted over all rows, and whether they exist."""
    units_per_row = tl.cdiv(columns, UNIT)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row = unit // units_per_row
    return row, (unit % units_per_row) * UNIT, unit, row < rows


@triton.jit
def load_chunk(ptr, start, step, left, right, GROUP: tl.constexpr):
    """``ptr[start + i * step]`` for i < 8 as a ``[UNITS, 8]`` tile; zeros in the halves that do not exist.

    Four-byte elements come in halves of 16 bytes. So do groups of 4, whose last half may be missing. A mask that is one
    value for a whole load keeps it a vector load at any row length.
    """
    HALF: tl.constexpr = CHUNK // 2
    if ptr.dtype.element_ty.primitive_bitwidth == 32 or GROUP < CHUNK:
        offset = start[:, None] + tl.arange(0, HALF)[None, :] * step
        first = tl.load(ptr + offset, mask=left[:, None], other=0.0)
        second = tl.load(ptr + offset + HALF * step, mask=right[:, None], other=0.0)
        return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [start.shape[0], CHUNK])
    else:
        offset = start[:, None] + tl.arange(0, CHUNK)[None, :] * step
        return tl.load(ptr + offset, mask=left[:, None], other=0.0)


@triton.jit
def score_chunk(weight, terms, row, column, columns, left, right, GROUP: tl.constexpr, KIND: tl.constexpr):
    """Scores of one chunk in fp32; ``terms`` as in ``Terms``.

    KIND: 0 ``|w|``, 1 ``|w| s_j``, 2 ``|w| (r_i + c_j) s_j`` (without s: 1), 3 ``w^2 F_ij``, 4 the given ``F_ij``.
    """
    weight = weight.to(tl.float32)
    if KIND >= 3:
        score = load_chunk(terms[3], row.to(tl.int64) * columns + column, 1, left, right, GROUP)
        if KIND == 3:
            score = weight * weight * score
    else:
        score = tl.abs(weight)
        if KIND == 2:
            row_term = tl.load(terms[1] + row, mask=left, other=0.0)
            score = score * (row_term[:, None] + load_chunk(terms[2], column, 1, left, right, GROUP))
        if terms[0] is not None:
            score = score * load_chunk(terms[0], column, 1, left, right, GROUP)
    return score


@triton.jit
def load_and_score(
    weight_ptr,
    terms,
    row,
    first_column,
    live,
    columns,
    stride_row,
    stride_column,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
):
    """The weights and the scores of this program's units, each a tuple of chunks."""
    weights = ()
    scores = ()
    right = live
    if GROUP < CHUNK:
        right = live & (first_column + GROUP < columns)
    for i in tl.static_range(UNIT // CHUNK):
        column = first_column + i * CHUNK
        start = row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
        weight = load_chunk(weight_ptr, start, stride_column, live, right, GROUP)
        score = score_chunk(weight, terms, row, column, columns, live, right, GROUP, KIND)
        weights = weights + (weight,)
        scores = scores + (score,)
    return weights, scores


@triton.jit
def split_columns(tile):
    """The columns of a ``[G, C]`` tile, C a power of 2, as C vectors."""
    G: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    if C == 1:
        return (tl.reshape(tile, [G]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [G, C // 2, 2]))
        evens = split_columns(even)
        odds = split_columns(odd)
        columns = ()
        for i in tl.static_range(C // 2):
            columns = columns + (evens[i], odds[i])
        return columns


@triton.jit
def split_chunks(chunks):
    """The columns of all chunks in order, as vectors."""
    columns = ()
    for i in tl.static_range(len(chunks)):
        columns = columns + split_columns(chunks[i])
    return columns


@triton.jit
def join_columns(columns):
    """The ``[G, C]`` tile whose columns are C vectors, C a power of 2: the inverse of ``split_columns``."""
    C: tl.constexpr = len(columns)
    if C == 1:
        return columns[0][:, None]
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(C // 2):
            evens = evens + (columns[2 * i],)
            odds = odds + (columns[2 * i + 1],)
        return tl.reshape(tl.join(join_columns(evens), join_columns(odds)), [columns[0].shape[0], C])


@triton.jit
def rank_chunk(chunk, others, FIRST: tl.constexpr, GROUP: tl.constexpr):
    """The number of better weights in the group of each weight of a chunk; ties go to the lower column.

    ``chunk`` holds the scores from column FIRST of the unit on, ``others`` those of all the unit's columns. All pairs
    are compared: for groups of at most 32 in registers this is faster than a sort, and no branch or address depends on
    the data.
    """
    column = FIRST + tl.arange(0, CHUNK)[None, :]
    rank = tl.zeros(chunk.shape, tl.int32)
    for i in tl.static_range(FIRST // GROUP * GROUP, (FIRST + CHUNK + GROUP - 1) // GROUP * GROUP):
        other = others[i][:, None]
        if i < FIRST:
            better = other >= chunk
        elif i >= FIRST + CHUNK:
            better = other > chunk
        else:
            better = (other > chunk) | ((other == chunk) & (i < column))
        if GROUP < CHUNK:
            better = better & (i // GROUP == column // GROUP)
        rank += better.to(tl.int32)
    return rank


@triton.jit
def demote_beyond_two_of_four(chunks):
    """Scores with all but the best two of each aligned four at minus infinity.

    A walk in rank order that skips the third and fourth of each aligned four keeps exactly the best of those that rank
    below 2 in their four. So the compliant selection is the plain one on these scores.
    """
    others = split_chunks(chunks)
    demoted = ()
    for i in tl.static_range(len(chunks)):
        rank = rank_chunk(chunks[i], others, i * CHUNK, 4)
        demoted = demoted + (tl.where(rank < 2, chunks[i], float("-inf")),)
    return demoted


def launch(
    kernel: Any, weight: torch.Tensor, *outputs: torch.Tensor, terms: Terms, group_size: int, kind: int, **others: Any
) -> None:
    """Run a kernel that begins with ``load_and_score`` on all units of ``weight [R, K]`` (any strides).

    ``kind`` numbers the score as in ``score_chunk``; ``others`` are arguments that only this kernel has.
    """
    rows, columns = weight.shape
    with device_of(weight):
        kernel[grid(rows, columns, group_size)](
            weight,
            *outputs,
            terms,
            rows,
            columns,
            *weight.stride(),
            GROUP=group_size,
            UNIT=unit_columns(group_size),
            KIND=kind,
            num_warps=4,
            **others,
        )


def scoring_case(
    kernel: Any,
    dtype: str,
    group_size: int,
    kind: int,
    *,
    types: dict[str, str | tuple[str, ...]],
    constants: dict[str, Any],
) -> CompileCase:
    """A compile case of a kernel that ``launch`` runs, for a contiguous weight."""
    used = {0: (), 1: (0,), 2: (0, 1, 2), 3: (3,), 4: (3,)}[kind]
    return CompileCase(
        f"{dtype}-group{group_size}-score{kind}",
        kernel,
        types={
            "weight_ptr": f"*{dtype}",
            "terms": tuple("*fp32" if term in used else "constexpr" for term in range(4)),
            "rows": "i32",
            "columns": "i32",
            "stride_row": "i32",
            **types,
        },
        constants={
            "stride_column": 1,
            "GROUP": group_size,
            "UNIT": unit_columns(group_size),
            "KIND": kind,
            **constants,
        },
        aligned=("columns", "stride_row"),
    )
