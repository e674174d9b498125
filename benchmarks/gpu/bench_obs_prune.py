"""``obs_prune`` beside SparseGPT's loop over columns, as it is published and run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sparsegpt import BLOCK, error_where_the_choice_agrees, make, published
from torch import Tensor

from gpu.runner import Context, Row
from msp.ops import obs_prune
from msp.ops.obs_prune import op
from msp.patterns import NMPattern


def measured(context: Context, weight: Tensor, factor: Tensor, pattern: NMPattern) -> Row:
    size, n, m = len(weight), pattern.n, pattern.m
    # as many operations as the trailing updates have, in one go
    a, b = context.randn(size, size // 2, dtype=torch.float32), context.randn(size // 2, size, dtype=torch.float32)
    with context.backend("cuda"):
        updated, kept = op(weight, factor, n, m, BLOCK)
        return context.row(
            f"obs_prune {pattern} fp32",
            f"{size}x{size}",
            lambda turn: obs_prune(weight, factor, pattern),
            {
                "torch loop": lambda turn: published(weight, factor, n, m),
                "unpacked": lambda turn: op(weight, factor, n, m, BLOCK),
                "one fp32 product": lambda turn: torch.mm(a, b),
            },
            error=error_where_the_choice_agrees(updated, kept, weight, factor, n, m),
            bound=1e-5,
            flops=size**3,
            # it looks at its inputs and outputs for NaN, and waits for the answer
            graph=False,
            figures=("obs-prune",) if (size, n, m) == (4096, 2, 8) else (),
        )


def rows(context: Context) -> Iterator[Row]:
    for size in context.sizes([4096, 8192], small=[64]):
        weight, factor = (tensor.to(context.device) for tensor in make(size))
        for text in ("2:8", "2:4", "4:16", "8:32"):
            yield measured(context, weight, factor, NMPattern.parse(text))
