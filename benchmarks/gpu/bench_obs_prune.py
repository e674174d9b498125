"""``obs_prune`` beside SparseGPT's loop over columns, as it is published and run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sparsegpt import BLOCK, error_where_the_choice_agrees, make, published

from gpu.runner import Context, Row
from msp.ops import obs_prune
from msp.ops.obs_prune import op
from msp.patterns import NMPattern


def rows(context: Context) -> Iterator[Row]:
    for size in context.sizes([4096, 8192], small=[64]):
        weight, factor = (tensor.to(context.device) for tensor in make(size))
        # as many operations as the trailing updates have, in one go
        a, b = context.randn(size, size // 2, dtype=torch.float32), context.randn(size // 2, size, dtype=torch.float32)
        for text in ("2:8", "2:4", "4:16", "8:32"):
            pattern = NMPattern.parse(text)
            with context.backend("cuda"):
                updated, kept = op(weight, factor, pattern.n, pattern.m, BLOCK)
                yield context.row(
                    f"obs_prune {text} fp32",
                    f"{size}x{size}",
                    lambda _, pattern=pattern: obs_prune(weight, factor, pattern),
                    {
                        "torch loop": lambda _, pattern=pattern: published(weight, factor, pattern.n, pattern.m),
                        "unpacked": lambda _, pattern=pattern: op(weight, factor, pattern.n, pattern.m, BLOCK),
                        "one fp32 product": lambda _: torch.mm(a, b),
                    },
                    error=error_where_the_choice_agrees(updated, kept, weight, factor, pattern.n, pattern.m),
                    bound=1e-5,
                    flops=size**3,
                    # it looks at its inputs and outputs for NaN, and waits for the answer
                    graph=False,
                    figures=("obs-prune",) if (size, text) == (4096, "2:8") else (),
                )
