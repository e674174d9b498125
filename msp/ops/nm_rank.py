"""The rank of every weight inside its group: one byte, which gives the mask for every N."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msp.formats.patterns import NMPattern, check_group_size
from msp.ops._compiled import compiled
from msp.ops._dispatch import Op
from msp.ops.scoring import Terms, check_counted, check_finite, check_scoring, rank_in_groups, score, scored_arguments


def reference(weight: Tensor, terms: Terms, group_size: int) -> Tensor:
    check_finite(weight, terms)
    return rank_in_groups(score(weight, terms), group_size)


op = Op("nm_rank", reference)


@op.backend("triton")
def triton(weight: Tensor, terms: Terms, group_size: int) -> Tensor:
    from msp.triton_kernels import nm_rank as kernels

    check_finite(weight, terms)
    rank = weight.new_empty(weight.shape, dtype=torch.uint8)
    kernels.nm_rank(weight, rank, terms.for_kernels, group_size=group_size, kind=terms.kind)
    return rank


@op.backend("cpu")
def cpu(weight: Tensor, terms: Terms, group_size: int) -> Tensor:
    weight = weight.contiguous()
    rank = weight.new_empty(weight.shape, dtype=torch.uint8)
    wrong = compiled("msp._cpu").nm_rank(
        **scored_arguments(weight, terms, group_size), rank_ptr=rank.data_ptr(), threads=torch.get_num_threads()
    )
    check_counted(wrong, weight, terms)
    return rank


@torch.library.custom_op("msp::nm_rank", mutates_args=())
def nm_rank_op(weight: Tensor, terms: Sequence[Tensor | None], group_size: int) -> Tensor:
    check_group_size(group_size)
    return op(weight, check_scoring(weight, group_size, Terms(*terms)), group_size)


@nm_rank_op.register_fake
def _(weight: Tensor, terms: Sequence[Tensor | None], group_size: int) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.uint8)


def nm_rank(
    weight: Tensor,
    group_size: int | NMPattern | str,
    *,
    column_scale: Tensor | None = None,
    row_term: Tensor | None = None,
    column_term: Tensor | None = None,
    importance: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """The number of better weights in the group of each weight: uint8 ``[R, K]``, 0 for the best.

    Ranks in a group are 0 ... M-1, each once; equal scores go to the lower column. ``rank < n`` is the mask
    that ``nm_select`` keeps at n:M, so the masks for all n are nested in one byte a weight.

    Args:
        weight: ``[R, K]`` fp32, fp16 or bf16, K a multiple of ``group_size``; any strides.
        group_size: 4, 8, 16 or 32, or a pattern N:M such as ``"2:8"``, of which M counts.
        column_scale, row_term, column_term, importance, scores: the score, as in ``nm_select``.

    Raises:
        TypeError, ValueError: as ``nm_select``.
        UsageError: another group size, or a text that is no pattern.
    """
    if isinstance(group_size, (NMPattern, str)):
        group_size = NMPattern.of(group_size).m
    check_group_size(group_size)
    terms = check_scoring(weight, group_size, Terms(column_scale, row_term, column_term, importance, scores))
    rank: Tensor = nm_rank_op(weight.detach(), terms, group_size)
    return rank
