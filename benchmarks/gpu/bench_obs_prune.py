"""``obs_prune``, compared with SparseGPT's loop over columns, as it is published and run."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from sparsegpt import BLOCK, error_where_the_choice_agrees, make, published
from torch import Tensor

from gpu.runner import Context, Measured, Missing, Planned
from msp.formats.patterns import NMPattern
from msp.ops import obs_prune
from msp.ops.obs_prune import op


def measured(context: Context, inputs: tuple[Tensor, Tensor], pattern: NMPattern, loop: bool) -> Measured:
    """``loop``: also time the published loop, which takes long."""
    (weight, factor), n, m = inputs, pattern.n, pattern.m
    size = len(weight)
    # as many operations as the trailing updates have, in one product
    a, b = context.randn(size, size // 2, dtype=torch.float32), context.randn(size // 2, size, dtype=torch.float32)
    with context.backend("cuda"):
        updated, kept = op(weight, factor, n, m, BLOCK)
        return context.measure(
            lambda turn: obs_prune(weight, factor, pattern),
            {
                "torch loop": (lambda turn: published(weight, factor, n, m)) if loop else Missing("with 2:8 only"),
                "unpacked": lambda turn: op(weight, factor, n, m, BLOCK),
                "one fp32 product": lambda turn: torch.mm(a, b),
            },
            error=error_where_the_choice_agrees(updated, kept, weight, factor, n, m),
            bound=1e-5,
            flops=size**3,
            # the op checks its inputs and outputs for NaN, and waits for the result
            graph=False,
        )


def rows(context: Context) -> Iterator[Planned]:
    @functools.lru_cache(1)
    def inputs(size: int) -> tuple[Tensor, Tensor]:
        weight, factor = make(size)
        return weight.to(context.device), factor.to(context.device)

    def measure(size: int, text: str) -> Measured:
        return measured(context, inputs(size), NMPattern.parse(text), loop=text == "2:8")

    for size in context.sizes([4096, 8192], small=[64]):
        for text in ("2:8", "2:4", "4:16", "8:32"):
            figures = ("obs-prune",) if (size, text) == (4096, "2:8") else ()
            yield Planned(f"obs_prune {text} fp32", f"{size}x{size}", functools.partial(measure, size, text), figures)
