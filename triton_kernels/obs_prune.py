"""Triton: SparseGPT's column sweep, one block of columns in registers, the trailing columns by one GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .targets import CompileCase

BLOCK_ROWS = 16


@triton.jit(do_not_specialize=["n"])
def obs_sweep_kernel(
    weight_ptr,
    kept_ptr,
    error_ptr,
    factor_ptr,
    rows,
    columns,
    start,
    width,
    n,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sweep columns ``start ... start + width`` of BLOCK_R rows; they never leave the registers.

    ``factor_ptr`` points at the block's own corner of the Cholesky factor, ``factor[start, start]``.
    A register tile cannot be indexed by a loop variable, so column i is the sum of the tile masked to it.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    offsets = r.to(tl.int64)[:, None] * columns + (start + c)[None, :]
    inside = (r < rows)[:, None] & (c < width)[None, :]
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
    diagonal = tl.load(factor_ptr + c.to(tl.int64) * (columns + 1), mask=c < width, other=1.0)

    kept = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int32)
    for first in range(0, width, M):
        score = tl.abs(weight) / diagonal[None, :]
        rank = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int32)
        for offset in tl.static_range(M):
            rival_column = first + offset
            rival = tl.sum(tl.where((c == rival_column)[None, :], score, 0.0), axis=1)[:, None]
            ahead = (rival > score) | ((rival == score) & (rival_column < c)[None, :])
            rank += ahead.to(tl.int32)
        group = ((c >= first) & (c < first + M))[None, :]
        kept = tl.where(group, (rank < n).to(tl.int32), kept)

        for column in range(first, first + M):
            pruned = (c == column)[None, :] & (kept == 0)
            removed = tl.sum(tl.where(pruned, weight, 0.0), axis=1)
            error = removed / tl.load(factor_ptr + column)
            factor_row = tl.load(factor_ptr + c, mask=(c > column) & (c < width), other=0.0)
            weight = tl.where(pruned, 0.0, weight - error[:, None] * factor_row[None, :])
            tl.store(error_ptr + r, error, mask=r < rows)
            factor_ptr += columns
            error_ptr += rows

    tl.store(weight_ptr + offsets, weight, mask=inside)
    tl.store(kept_ptr + offsets, kept.to(tl.int8), mask=inside)


def obs_prune(
    weight: torch.Tensor, hinv_chol: torch.Tensor, n: int, m: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight ``[R, K]``, hinv_chol float32 ``[K, K]`` upper -> updated float32 ``[R, K]``, kept bool ``[R, K]``."""
    rows, columns = weight.shape
    # The ends of the blocks change only the rounding, and with more columns than this registers spill.
    block_size = min(block_size, 128)
    updated = weight.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    factor = hinv_chol.contiguous()
    kept = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    # Errors lie column by column, so that each step of the sweep writes neighbouring addresses.
    errors = torch.empty((min(block_size, columns), rows), dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(updated):
        for start in range(0, columns, block_size):
            stop = min(start + block_size, columns)
            obs_sweep_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
                updated,
                kept,
                errors,
                factor[start:, start:],
                rows,
                columns,
                start,
                stop - start,
                n,
                M=m,
                BLOCK_R=BLOCK_ROWS,
                BLOCK_C=triton.next_power_of_2(min(block_size, columns)),
                num_warps=4,
            )
            if stop < columns:
                updated[:, stop:].addmm_(errors[: stop - start].t(), factor[start:stop, stop:], alpha=-1)
    return updated, kept.bool()


def compile_cases() -> Iterator[CompileCase]:
    for m in (4, 8, 32):
        yield CompileCase(
            name=f"{m}",
            kernel=obs_sweep_kernel,
            types={
                "weight_ptr": "*fp32",
                "kept_ptr": "*i8",
                "error_ptr": "*fp32",
                "factor_ptr": "*fp32",
                "rows": "i32",
                "columns": "i32",
                "start": "i32",
                "width": "i32",
                "n": "i32",
            },
            constants={"M": m, "BLOCK_R": BLOCK_ROWS, "BLOCK_C": 128},
            aligned=("rows", "columns", "start", "width"),
        )
