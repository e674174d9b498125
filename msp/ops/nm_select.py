"""Keep the N best of every M consecutive weights of a row, and pack them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msp.formats.packed_weight import PackedWeight, pack_bits
from msp.formats.patterns import NMPattern
from msp.formats.storage import Storage, packed_widths
from msp.ops._compiled import compiled
from msp.ops._dispatch import Op
from msp.ops.scoring import Terms, check_counted, check_finite, check_scoring, rank_in_groups, score, scored_arguments


def reference(weight: Tensor, terms: Terms, n: int, m: int, compliant: bool) -> tuple[Tensor, Tensor]:
    check_finite(weight, terms)
    scores = score(weight, terms)
    if compliant:
        # A walk in rank order that skips the third and fourth of each aligned 4 keeps exactly the best of those that
        # rank below 2 in their 4.
        scores = scores.masked_fill(rank_in_groups(scores, 4) >= 2, -torch.inf)
    kept = rank_in_groups(scores, m) < n
    return weight[kept].view(len(weight), packed_widths(n, m, weight.shape[1])[0]), pack_bits(kept)


op = Op("nm_select", reference)


def _empty(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    kept, index = packed_widths(n, m, columns)
    return weight.new_empty(rows, kept), weight.new_empty(rows, index, dtype=torch.uint8)


@op.backend("triton")
def triton(weight: Tensor, terms: Terms, n: int, m: int, compliant: bool) -> tuple[Tensor, Tensor]:
    from msp.triton_kernels import nm_select as kernels

    check_finite(weight, terms)
    values, bitmask = _empty(weight, n, m)
    kernels.nm_select(
        weight, values, bitmask, terms.for_kernels, n=n, group_size=m, kind=terms.kind, compliant=compliant
    )
    return values, bitmask


def _compiled(
    module: str, weight: Tensor, terms: Terms, n: int, m: int, compliant: bool, **others: int
) -> tuple[Tensor, Tensor, int]:
    """Call the C++ or CUDA binding with addresses and codes; ``others``: the threads, or the arguments of CUDA."""
    weight = weight.contiguous()
    values, bitmask = _empty(weight, n, m)
    wrong = compiled(module).nm_select(
        **scored_arguments(weight, terms, m),
        n=n,
        compliant=compliant,
        values_ptr=values.data_ptr(),
        bitmask_ptr=bitmask.data_ptr(),
        **others,
    )
    return values, bitmask, wrong


@op.backend("cpu")
def cpu(weight: Tensor, terms: Terms, n: int, m: int, compliant: bool) -> tuple[Tensor, Tensor]:
    values, bitmask, wrong = _compiled("msp._cpu", weight, terms, n, m, compliant, threads=torch.get_num_threads())
    check_counted(wrong, weight, terms)
    return values, bitmask


def launch(weight: Tensor, terms: Terms, n: int, m: int, compliant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the CUDA kernel without waiting: values, bitmask, and int32 ``[1]``, not 0 if it met NaN or infinity."""
    wrong = torch.zeros(1, dtype=torch.int32, device=weight.device)
    with torch.cuda.device(weight.device):
        stream = torch.cuda.current_stream().cuda_stream
        others = {"wrong_ptr": wrong.data_ptr(), "stream": stream}
        values, bitmask, _ = _compiled("msp._cuda", weight, terms, n, m, compliant, **others)
    return values, bitmask, wrong


@op.backend("cuda")
def cuda(weight: Tensor, terms: Terms, n: int, m: int, compliant: bool) -> tuple[Tensor, Tensor]:
    values, bitmask, wrong = launch(weight, terms, n, m, compliant)
    if int(wrong) or not weight.numel():
        check_finite(weight, terms)
    return values, bitmask


@torch.library.custom_op("msp::nm_select", mutates_args=())
def nm_select_op(
    weight: Tensor, terms: Sequence[Tensor | None], n: int, m: int, compliant: bool
) -> tuple[Tensor, Tensor]:
    NMPattern(n, m)  # raises for a pattern that is none
    return op(weight, check_scoring(weight, m, Terms(*terms)), n, m, compliant)


@nm_select_op.register_fake
def _(weight: Tensor, terms: Sequence[Tensor | None], n: int, m: int, compliant: bool) -> tuple[Tensor, Tensor]:
    # the table itself: sizes may be symbols here, which cannot be remembered
    parts = Storage(NMPattern(n, m)).packed_parts(*weight.shape)
    values, bitmask = (weight.new_empty(part.shape, dtype=part.dtype) for part in parts.values())
    return values, bitmask


def nm_select(
    weight: Tensor,
    pattern: NMPattern | str,
    *,
    column_scale: Tensor | None = None,
    row_term: Tensor | None = None,
    column_term: Tensor | None = None,
    importance: Tensor | None = None,
    scores: Tensor | None = None,
    compliant: bool = False,
) -> PackedWeight:
    """Keep the N best of every M consecutive weights of each row; equal scores go to the lower column.

    The score is ``|w|``; with ``column_scale [K]`` Wanda's ``|w| s_j`` (arXiv 2306.11695); with ``row_term [R]`` and
    ``column_term [K]`` RIA's ``|w| (r_i + c_j) s_j`` (arXiv 2402.04902); with ``importance [R, K]`` the second-order
    ``w^2 F_ij``; or ``scores [R, K]`` as given. Scores are computed in fp32.

    Args:
        weight: ``[R, K]`` fp32, fp16 or bf16, K a multiple of M; any strides.
        pattern: N:M, N kept, or its text such as ``"2:8"``.
        compliant: also keep at most 2 of each aligned 4 (so that 2:4 sparse tensor cores can run it): walk a group in
            rank order and skip the third and fourth of each 4.

    Raises:
        TypeError: a dtype that cannot be packed or ranked.
        ValueError: a shape or device that does not fit, terms that exclude each other, NaN or infinite
            weights, terms or scores (with their number), or ``compliant`` with N > M/2.
        UsageError: a text that is no pattern.
    """
    pattern = NMPattern.of(pattern)
    terms = check_scoring(weight, pattern.m, Terms(column_scale, row_term, column_term, importance, scores))
    if compliant and 2 * pattern.n > pattern.m:
        raise ValueError(f"pattern {pattern} cannot be compliant: at most 2 of every 4 leaves {pattern.m // 2} to keep")
    values, bitmask = nm_select_op(
        weight.detach(), terms, pattern.n, pattern.m, compliant and not pattern.always_compliant
    )
    rows, columns = weight.shape
    return PackedWeight(values, bitmask, pattern, (rows, columns))
