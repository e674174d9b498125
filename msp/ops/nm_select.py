"""``nm_select``: keep the N best of every M weights, and pack them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msp.ops._dispatch import Op, compiled_module
from msp.ops.packed import PackedWeight, check_weight, pack_bits
from msp.ops.scoring import check_terms, rank, score
from msp.patterns import NMPattern

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def reference(
    weight: Tensor,
    n: int,
    m: int,
    compliant: bool,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    scores = score(weight, kind, column_scale, row_term, column_term, matrix)
    if compliant:
        # Taking the best first, a weight is refused once two of its four are taken: those of rank 2 and 3
        # among four come after every other weight of the group.
        scores = scores.masked_fill(rank(scores, 4) >= 2, -torch.inf)
    kept = rank(scores, m) < n
    return weight.masked_select(kept).view(rows, columns // m * n), pack_bits(kept)


op = Op("nm_select", reference)


def _empty(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    values = torch.empty(rows, columns // m * n, dtype=weight.dtype, device=weight.device)
    return values, torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=weight.device)


@op.backend("triton")
def triton(
    weight: Tensor,
    n: int,
    m: int,
    compliant: bool,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from msp.triton_kernels import nm_select as kernels

    values, bitmask = _empty(weight, n, m)
    kernels.nm_select(
        weight,
        values,
        bitmask,
        n=n,
        group_size=m,
        kind=kind,
        compliant=compliant,
        column_scale=column_scale,
        row_term=row_term,
        column_term=column_term,
        matrix=matrix,
    )
    return values, bitmask


def _compiled(
    module: Any,
    last: int,
    weight: Tensor,
    n: int,
    m: int,
    compliant: bool,
    kind: int,
    terms: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """One call of a compiled module; ``last`` is its number of threads, or its stream."""
    weight = weight.contiguous()
    values, bitmask = _empty(weight, n, m)
    pointers = [0 if term is None else term.data_ptr() for term in terms]
    module.nm_select(
        weight.data_ptr(),
        DTYPE_CODES[weight.dtype],
        *weight.shape,
        m,
        n,
        compliant,
        kind,
        *pointers,
        values.data_ptr(),
        bitmask.data_ptr(),
        last,
    )
    return values, bitmask


@op.backend("cpu")
def cpu(
    weight: Tensor,
    n: int,
    m: int,
    compliant: bool,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    terms = (column_scale, row_term, column_term, matrix)
    module = compiled_module("msp._cpu")
    return _compiled(module, torch.get_num_threads(), weight, n, m, compliant, kind, terms)


@op.backend("cuda")
def cuda(
    weight: Tensor,
    n: int,
    m: int,
    compliant: bool,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    terms = (column_scale, row_term, column_term, matrix)
    with torch.cuda.device(weight.device):
        stream = torch.cuda.current_stream().cuda_stream
        return _compiled(compiled_module("msp._cuda"), stream, weight, n, m, compliant, kind, terms)


@torch.library.custom_op("msp::nm_select", mutates_args=())
def nm_select_op(
    weight: Tensor,
    n: int,
    m: int,
    compliant: bool,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return op(weight, n, m, compliant, kind, column_scale, row_term, column_term, matrix)


@nm_select_op.register_fake
def _(
    weight: Tensor,
    n: int,
    m: int,
    compliant: bool,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty(weight, n, m)


def nm_select(
    weight: Tensor,
    pattern: NMPattern,
    *,
    column_scale: Tensor | None = None,
    row_term: Tensor | None = None,
    column_term: Tensor | None = None,
    importance: Tensor | None = None,
    scores: Tensor | None = None,
    compliant: bool = False,
) -> PackedWeight:
    """Keep the N highest scores of every M consecutive weights; ties go to the lower column.

    The score, in float32: ``|w|``; with ``column_scale`` s ``|w| s_j`` (Wanda, arXiv 2306.11695); with
    ``row_term`` r and ``column_term`` c ``|w| (r_i + c_j) s_j`` (RIA, ICLR 2024; s is 1 without
    ``column_scale``); with ``importance`` F ``w^2 F_ij``; or ``scores`` themselves.

    Args:
        weight: ``[R, K]``, float32, float16 or bfloat16, K a multiple of M.
        pattern: N:M, N kept.
        column_scale, column_term: ``[K]``. row_term: ``[R]``. importance, scores: ``[R, K]``.
        compliant: keep at most 2 of each aligned 4, as 2:4 sparse tensor cores need: the best are taken
            first, and a weight is passed over where two of its four are taken.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: shapes or devices do not match, terms exclude each other, a compliant pattern keeps more
            than half, or anything is NaN or infinite (says how many).
    """
    rows, columns = check_weight("nm_select", weight, pattern)
    if compliant and 2 * pattern.n > pattern.m:
        raise ValueError(f"nm_select: {pattern} keeps more than 2 of 4, so no selection of it is compliant")
    terms = check_terms("nm_select", weight, column_scale, row_term, column_term, importance, scores)
    if not weight.numel() or pattern.is_empty:
        values = weight.new_empty(rows, columns // pattern.m * pattern.n)
        bitmask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8, device=weight.device)
        return PackedWeight(values, bitmask, pattern, (rows, columns))
    values, bitmask = nm_select_op(
        weight,
        pattern.n,
        pattern.m,
        compliant,
        terms.kind,
        terms.column_scale,
        terms.row_term,
        terms.column_term,
        terms.matrix,
    )
    return PackedWeight(values, bitmask, pattern, (rows, columns))
