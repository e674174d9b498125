"""``nm_rank``: the rank of each weight inside its group; masks for every N are nested in it."""

from __future__ import annotations

import torch
from torch import Tensor

from msp.ops._dispatch import Op
from msp.ops.packed import check_weight
from msp.ops.scoring import check_terms, rank, score
from msp.patterns import NMPattern


def reference(
    weight: Tensor,
    group_size: int,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> Tensor:
    return rank(score(weight, kind, column_scale, row_term, column_term, matrix), group_size)


op = Op("nm_rank", reference)


@op.backend("triton")
def triton(
    weight: Tensor,
    group_size: int,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> Tensor:
    from msp.triton_kernels import nm_rank as kernels

    found = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    kernels.nm_rank(
        weight,
        found,
        group_size=group_size,
        kind=kind,
        column_scale=column_scale,
        row_term=row_term,
        column_term=column_term,
        matrix=matrix,
    )
    return found


@torch.library.custom_op("msp::nm_rank", mutates_args=())
def nm_rank_op(
    weight: Tensor,
    group_size: int,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> Tensor:
    return op(weight, group_size, kind, column_scale, row_term, column_term, matrix)


@nm_rank_op.register_fake
def _(
    weight: Tensor,
    group_size: int,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.uint8)


def nm_rank(
    weight: Tensor,
    group_size: int,
    *,
    column_scale: Tensor | None = None,
    row_term: Tensor | None = None,
    column_term: Tensor | None = None,
    importance: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """The rank of each weight among the ``group_size`` consecutive ones of its group, 0 the best.

    ``rank < N`` is the mask that ``nm_select`` keeps for N:M, for every N. Scores and errors as there.

    Args:
        weight: ``[R, K]``, float32, float16 or bfloat16, K a multiple of ``group_size``.
        group_size: M: 4, 8, 16 or 32.

    Returns:
        uint8 ``[R, K]``.
    """
    check_weight("nm_rank", weight, NMPattern(0, group_size))
    terms = check_terms("nm_rank", weight, column_scale, row_term, column_term, importance, scores)
    if not weight.numel():
        return weight.new_empty(weight.shape, dtype=torch.uint8)
    found: Tensor = nm_rank_op(
        weight, group_size, terms.kind, terms.column_scale, terms.row_term, terms.column_term, terms.matrix
    )
    return found
