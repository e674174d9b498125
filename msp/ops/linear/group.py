"""``y_i = x W_i^T + b_i`` of several weights in tiles, such as q/k/v or gate/up, for one or two tokens in one launch.

A small product ends before the GPU is full, and each launch waits for the last block of the one before it. The weights
may differ in rows and pattern. Every ``y_i`` is, to the last bit, what the product in tiles alone computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from msp.formats.patterns import NMPattern
from msp.ops._compiled import compiled
from msp.ops._dispatch import cuda_serves, define
from msp.ops.linear import rows
from msp.ops.linear import tiles as single
from msp.ops.linear.checks import check
from msp.ops.linear.compiled import struct_of
from msp.ops.linear.plan import device_limits, plan
from msp.ops.linear.thresholds import GATHER_TOKENS

# Weights that a launch takes: ``NmLinearGroup::kMost`` of the kernel.
MOST = 4
MOST_TOKENS = GATHER_TOKENS

T = TypeVar("T")


def reference(x: Tensor, weights: Sequence[single.Weight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [single.reference(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


op = rows.op.form("group", reference)


@op.backend("triton")
def triton(x: Tensor, weights: Sequence[single.Weight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [single.triton(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@op.backend(
    "cuda",
    available=lambda: cuda_serves("nm_linear_group"),
    supports=lambda x, weights, biases: x.dtype.itemsize == 2,
)
def cuda(x: Tensor, weights: Sequence[single.Weight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    flat = single.flattened(x)
    tokens, columns = flat.shape
    # the cut of a gather is the same for any number of rows and any pattern
    first = weights[0]
    pattern = NMPattern(first.n, first.m)
    chosen = plan(tokens, first.values.shape[0], columns, pattern, False, device_limits(x.device))
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    results = [x.new_empty(*x.shape[:-1], weight.values.shape[0]) for weight in weights]
    partials = [single.partial_sums(flat, weight.values.shape[0], chosen) for weight in weights]
    module = compiled("msp._cuda")
    structs = [
        struct_of(module.TiledWeight, weight.values, weight.bitmask, weight.n, weight.m, columns, weight.counted)
        for weight in weights
    ]
    own = [
        (struct, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
        for struct, *tensors in zip(structs, biases, results, partials, strict=True)
    ]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        module.nm_linear_group(own, single.cut_of(module.LinearCut, chosen), flat.data_ptr(), tokens, stream)
    return results


def _check(
    check_one: Callable[..., T],
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
    columns: int,
) -> list[T]:
    """Raise unless the group can be served; otherwise return what ``check_one`` does for each weight."""
    if not len(values) == len(bitmasks) == len(biases) == len(n) == len(m):
        raise ValueError("a group has as many bitmasks, biases and patterns as values")
    if not 1 <= len(values) <= MOST:
        raise ValueError(f"{len(values)} weights in a group: 1 to {MOST} are served")
    found = [check_one(x, *own, columns) for own in zip(values, bitmasks, biases, n, m, strict=True)]
    if not 1 <= x.numel() // columns <= MOST_TOKENS:
        raise ValueError(f"x of shape {list(x.shape)} has not 1 to {MOST_TOKENS} tokens of {columns}")
    return found


def _implementation(
    x: Tensor,
    values: Sequence[Tensor],
    bitmasks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: Sequence[int],
    m: Sequence[int],
    columns: int,
) -> list[Tensor]:
    counted = _check(single.check_tiles, x, values, bitmasks, biases, n, m, columns)
    own = zip(zip(values, bitmasks, n, m, strict=True), counted, strict=True)
    return op(x, [single.Weight(*parts, False, None, known) for parts, known in own], biases)


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


group_op = define(
    "nm_linear_group(Tensor x, Tensor[] values, Tensor[] bitmasks, Tensor?[] biases, int[] n, int[] m, int columns) "
    "-> Tensor[]",
    _implementation,
    _fake,
)
