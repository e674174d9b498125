"""``obs_prune``: SparseGPT's column sweep with N:M selection."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from msp.formats.packed_weight import PackedWeight, check_matrix
from msp.formats.patterns import NMPattern, check_group_size
from msp.ops._checks import check_companion, require_finite
from msp.ops._compiled import compiled
from msp.ops._dispatch import Op, cuda_serves
from msp.ops.nm_select import nm_select


def reference(weight: Tensor, hinv_chol: Tensor, n: int, m: int, block_size: int) -> tuple[Tensor, Tensor]:
    # Transposed, a column of the weight is one contiguous row.
    updated = weight.t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    kept = torch.zeros(updated.shape, dtype=torch.bool, device=weight.device)
    diagonal = hinv_chol.diagonal()[:, None]
    for start in range(0, len(updated), block_size):
        stop = min(start + block_size, len(updated))
        errors = torch.empty_like(updated[start:stop])
        for i in range(start, stop):
            if i % m == 0:
                # |w| / U_jj ranks as w^2 / U_jj^2 does, and does not underflow.
                score = updated[i : i + m].abs() / diagonal[i : i + m]
                best = score.sort(dim=0, descending=True, stable=True).indices[:n]
                kept[i : i + m].scatter_(0, best, True)
            error = torch.where(kept[i], 0.0, updated[i]) / diagonal[i]
            updated[i].masked_fill_(~kept[i], 0.0)
            updated[i + 1 : stop].addr_(hinv_chol[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        updated[stop:].addmm_(hinv_chol[start:stop, stop:].t(), errors, alpha=-1)
    return updated.t(), kept.t()


op = Op("obs_prune", reference)


@op.backend("triton")
def triton(weight: Tensor, hinv_chol: Tensor, n: int, m: int, block_size: int) -> tuple[Tensor, Tensor]:
    from msp.triton_kernels import obs_prune as kernels

    pruned: tuple[Tensor, Tensor] = kernels.obs_prune(weight, hinv_chol, n, m, block_size)
    return pruned


@op.backend("cpu")
def cpu(weight: Tensor, hinv_chol: Tensor, n: int, m: int, block_size: int) -> tuple[Tensor, Tensor]:
    # The kernel has blocks of its own and adds in the order of the columns, so its blocks do not change the rounding.
    weight = weight.to(torch.float32).contiguous()
    factor = hinv_chol.contiguous()
    updated = torch.empty_like(weight)
    kept = torch.empty(weight.shape, dtype=torch.bool)
    compiled("msp._cpu").obs_prune(
        weight_ptr=weight.data_ptr(),
        factor_ptr=factor.data_ptr(),
        updated_ptr=updated.data_ptr(),
        kept_ptr=kept.data_ptr(),
        rows=weight.shape[0],
        columns=weight.shape[1],
        group_size=m,
        n=n,
        threads=torch.get_num_threads(),
    )
    return updated, kept


@op.backend("cuda", available=lambda: cuda_serves("obs_prune_block"))
def cuda(weight: Tensor, hinv_chol: Tensor, n: int, m: int, block_size: int) -> tuple[Tensor, Tensor]:
    # The kernel's blocks have one size; the block size changes only the rounding.
    module = compiled("msp._cuda")
    with torch.cuda.device(weight.device):
        stream = torch.cuda.current_stream().cuda_stream
        prune_block = functools.partial(module.obs_prune_block, stream=stream)
        return sweep_blocks(weight, hinv_chol, n, m, module.obs_block_columns, prune_block)


def sweep_blocks(
    weight: Tensor, hinv_chol: Tensor, n: int, m: int, block_size: int, prune_block: Callable[..., None]
) -> tuple[Tensor, Tensor]:
    """The reference's outer loop around a compiled sweep of one block, called as ``msp._cuda.obs_prune_block``."""
    updated = weight.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    factor = hinv_chol.contiguous()
    if factor.data_ptr() % 16:
        factor = factor.clone()
    rows, columns = updated.shape
    kept = torch.empty(updated.shape, dtype=torch.bool, device=weight.device)
    errors = torch.empty(min(block_size, columns), rows, device=weight.device)
    whole = {
        "weight_ptr": updated.data_ptr(),
        "factor_ptr": factor.data_ptr(),
        "errors_ptr": errors.data_ptr(),
        "kept_ptr": kept.data_ptr(),
        "rows": rows,
        "columns": columns,
        "group_size": m,
        "n": n,
    }
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        prune_block(**whole, start=start, width=stop - start)
        if stop < columns:
            updated[:, stop:].addmm_(errors[: stop - start].t(), factor[start:stop, stop:], alpha=-1)
    return updated, kept


@contextmanager
def float32_products() -> Iterator[None]:
    """Disable TF32 in a GPU's products, for any setting of the process: it would change the selection."""
    matmul: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@torch.library.custom_op("msp::obs_prune", mutates_args=())
def obs_prune_op(weight: Tensor, hinv_chol: Tensor, n: int, m: int, block_size: int) -> tuple[Tensor, Tensor]:
    _check(weight, hinv_chol, m, block_size)
    with float32_products():
        updated, kept = op(weight, hinv_chol, n, m, block_size)
    return updated.to(weight.dtype).contiguous(), kept.contiguous()


@obs_prune_op.register_fake
def _(weight: Tensor, hinv_chol: Tensor, n: int, m: int, block_size: int) -> tuple[Tensor, Tensor]:
    updated = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return updated, torch.empty_like(updated, dtype=torch.bool)


def obs_prune(weight: Tensor, hinv_chol: Tensor, pattern: NMPattern | str, *, block_size: int = 128) -> PackedWeight:
    """Prune column by column and correct each error in the later columns (arXiv 2301.00774, algorithm 1).

    At the first column of each group the N weights of highest ``w^2 / U_jj^2`` are selected, w as updated so far.
    Column i then passes the error of its pruned weights, ``e = w / U_ii``, to the columns j > i of its block, ``w_j -=
    e U_ij``; the columns after the block get the block's errors in one product. Computed in float32, cast to the
    weight's dtype at the end.

    Args:
        weight: ``[R, K]``, float32, float16 or bfloat16.
        hinv_chol: float32 ``[K, K]``: the upper triangular U with ``H^-1 = U^T U``. Entries below the diagonal are not
            read.
        pattern: weights kept per group, N:M or its text such as ``"2:8"``; K must be a multiple of M.
        block_size: columns between two trailing updates, a multiple of M. It changes rounding and speed only.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: shapes, devices, pattern or block size do not match; an input holds NaN or infinity (the message
            counts them); U's diagonal is not positive; an updated weight overflows the dtype.
        UsageError: a text that is no pattern.
    """
    pattern = NMPattern.of(pattern)
    _check(weight, hinv_chol, pattern.m, block_size)
    require_finite("obs_prune", "weight", weight)
    columns = weight.shape[1]
    if not torch.isfinite(hinv_chol.sum()):
        require_finite("obs_prune", "hinv_chol", hinv_chol.triu())
    bad = int((hinv_chol.diagonal() <= 0).sum())
    if bad:
        raise ValueError(f"obs_prune: {bad} of the {columns} diagonal entries of hinv_chol are not positive")
    if not weight.numel():
        return PackedWeight.from_mask(weight, torch.zeros_like(weight, dtype=torch.bool), pattern)
    updated, kept = obs_prune_op(weight, hinv_chol, pattern.n, pattern.m, block_size)
    require_finite("obs_prune", f"weight, once updated and cast to {weight.dtype},", updated)
    return _pack(updated, kept, pattern)


def _check(weight: Tensor, hinv_chol: Tensor, m: int, block_size: int) -> None:
    check_matrix("obs_prune: weight", weight, check_group_size(m))
    columns = weight.shape[1]
    check_companion("obs_prune", "hinv_chol", hinv_chol, (columns, columns), "weight", weight)
    if block_size < 1 or block_size % m:
        raise ValueError(f"obs_prune: block_size is {block_size}, needed is a positive multiple of {m}")


def _pack(updated: Tensor, kept: Tensor, pattern: NMPattern) -> PackedWeight:
    # The selecting kernels find the kept weights again, and pack them, several times faster than indexing with the
    # mask. If no kept weight is zero, they are the N largest of their group, and the mask need not be read.
    if op.last() == "cpu" and torch.count_nonzero(updated) == updated.numel() // pattern.m * pattern.n:
        return nm_select(updated, pattern)
    return nm_select(updated, pattern, scores=kept.float())
