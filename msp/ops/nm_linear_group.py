"""``y_i = x W_i^T + b_i`` of several weights in tiles, such as q/k/v or gate/up, for one or two tokens in one launch.

A small product ends before the GPU is full, and each launch waits for the last block of the one before it. The weights
may differ in rows and pattern. Every ``y_i`` is, to the last bit, what ``nm_linear_tiles`` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES
from msp.formats.patterns import NMPattern
from msp.ops import nm_linear_tiles as single
from msp.ops._compiled import compiled_module
from msp.ops._dispatch import Op, cuda_serves, define
from msp.ops.nm_linear import check
from msp.ops.nm_linear_plan import GATHER_TOKENS, device_limits, plan

# Weights that a launch takes: ``NmLinearGroup::kMost`` of the kernel.
MOST = 4
MOST_TOKENS = GATHER_TOKENS


def reference(
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
) -> list[Tensor]:
    return [single.reference(x, *own, False, None) for own in zip(values, bitmasks, biases, n, m, strict=True)]


op = Op("nm_linear_group", reference)


@op.backend("triton")
def triton(
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
) -> list[Tensor]:
    return [single.triton(x, *own, False, None) for own in zip(values, bitmasks, biases, n, m, strict=True)]


@op.backend(
    "cuda",
    available=lambda: cuda_serves("nm_linear_group"),
    supports=lambda x, values, bitmasks, biases, n, m: x.dtype.itemsize == 2,
)
def cuda(
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
) -> list[Tensor]:
    flat = single.flattened(x)
    tokens, columns = flat.shape
    # the cut of a gather is the same for any number of rows and any pattern
    chosen = plan(tokens, values[0].shape[0], columns, NMPattern(n[0], m[0]), False, device_limits(x.device))
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    results = [x.new_empty(*x.shape[:-1], part.shape[0]) for part in values]
    partials = [single.partial_sums(flat, part.shape[0], chosen) for part in values]
    tensors = zip(values, bitmasks, biases, results, partials, strict=True)
    own = [
        (*(0 if tensor is None else tensor.data_ptr() for tensor in of_one), of_one[0].shape[0], group_size, kept)
        for of_one, group_size, kept in zip(tensors, m, n, strict=True)
    ]
    compiled = compiled_module("msp._cuda")
    assert compiled is not None
    with torch.cuda.device(x.device):
        compiled.nm_linear_group(
            flat.data_ptr(),
            own,
            VALUE_DTYPES.index(x.dtype),
            tokens,
            columns,
            chosen.stripes,
            chosen.splits,
            torch.cuda.current_stream().cuda_stream,
        )
    return results


def _check(
    check_one: Callable[..., None],
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
    columns: int,
) -> None:
    if not len(values) == len(bitmasks) == len(biases) == len(n) == len(m):
        raise ValueError("a group has as many bitmasks, biases and patterns as values")
    if not 1 <= len(values) <= MOST:
        raise ValueError(f"{len(values)} weights in a group: 1 to {MOST} are served")
    for own in zip(values, bitmasks, biases, n, m, strict=True):
        check_one(x, *own, columns)
    if not 1 <= x.numel() // columns <= MOST_TOKENS:
        raise ValueError(f"x of shape {list(x.shape)} has not 1 to {MOST_TOKENS} tokens of {columns}")


def _implementation(
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
    columns: int,
) -> list[Tensor]:
    _check(single.check_tiles, x, values, bitmasks, biases, n, m, columns)
    return op(x, values, bitmasks, biases, n, m)


def _fake(
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
    columns: int,
) -> list[Tensor]:
    _check(check, x, values, bitmasks, biases, n, m, columns)
    return [x.new_empty(*x.shape[:-1], part.shape[0]) for part in values]


nm_linear_group = define(
    "nm_linear_group(Tensor x, Tensor[] values, Tensor[] bitmasks, Tensor?[] biases, int[] n, int[] m, int columns) "
    "-> Tensor[]",
    _implementation,
    _fake,
)
