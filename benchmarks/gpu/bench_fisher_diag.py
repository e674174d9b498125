"""``fisher_diag_``, compared with cuBLAS, which writes each sequence's gradient, squares it and adds."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.runner import Context, Measured, Planned, relative_error
from msp.ops import fisher_diag_
from msp.ops.fisher_diag import op

# sequences, tokens, rows, columns: q, gate and k of Llama-2-7B and Llama-3-8B
SHAPES = [
    (8, 2048, 4096, 4096),
    (8, 256, 4096, 4096),
    (4, 2048, 11008, 4096),
    (8, 256, 14336, 4096),
    (8, 2048, 1024, 4096),
]


def inputs(context: Context, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """With a common direction, as real inputs and gradients have."""
    sequences, tokens, height, width = shape
    x = context.randn(sequences, tokens, width) + context.randn(width)
    return x, context.randn(sequences, tokens, height) + context.randn(height)


def gradients(x: Tensor, g: Tensor) -> Iterator[Tensor]:
    """The sum in float64, one sequence after another."""
    for inputs, outputs in zip(x, g, strict=True):
        yield outputs.double().t() @ inputs.double()


def measured(context: Context, shape: tuple[int, int, int, int], checks: bool) -> Measured:
    """``checks``: with the search for NaN, which waits for a result, so that no CUDA graph is possible."""
    sequences, tokens, height, width = shape
    nbytes = 2 * sequences * tokens * (height + width)
    pairs = context.rotate(lambda: inputs(context, shape), nbytes)
    acc, theirs = (torch.zeros(height, width, device=context.device) for _ in range(2))
    wanted = torch.zeros(height, width, dtype=torch.float64, device=context.device)
    for gradient in gradients(*pairs[0]):
        wanted.addcmul_(gradient, gradient)

    def per_sequence(turn: int) -> None:
        for x, g in zip(*pairs[turn], strict=True):
            gradient = (g.t() @ x).float()
            theirs.addcmul_(gradient, gradient)

    def product_alone(turn: int) -> None:
        for x, g in zip(*pairs[turn], strict=True):
            torch.mm(g.t(), x)

    with context.backend("triton"):
        fisher_diag_(acc, *pairs[0])
        return context.measure(
            lambda turn: (fisher_diag_ if checks else op)(acc, *pairs[turn]),
            {"cuBLAS + square + add": per_sequence, "cuBLAS alone": product_alone},
            error=relative_error(acc, wanted),
            bound=1e-2,
            moved=nbytes + 8 * height * width,
            flops=2 * sequences * tokens * height * width,
            turns=len(pairs),
            graph=not checks,
        )


def rows(context: Context) -> Iterator[Planned]:
    for shape in context.sizes(SHAPES, small=[(2, 16, 16, 24)]):
        tokens, text = shape[1], "x".join(map(str, shape))
        figures = (f"fisher-diag-{tokens}", *(("fisher-diag-rate",) if tokens == 2048 else ()))
        yield Planned("fisher_diag_ bf16", text, functools.partial(measured, context, shape, False), figures)
        yield Planned("fisher_diag_ with its checks bf16", text, functools.partial(measured, context, shape, True))
