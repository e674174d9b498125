"""``fisher_diag_`` and ``fisher_trace`` on the CPU, compared with the usual code in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from runner import measure
from torch import Tensor

from msp.ops import fisher_diag_, fisher_trace, force_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# sequences, tokens, rows, columns
SHAPES = [(4, 256, 4096, 4096), (4, 256, 4096, 11008), (8, 128, 768, 768), (2, 2048, 2048, 2048)]
BOUND = 1e-5


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and gradients with a common direction, as real ones have."""
    sequences, tokens, rows, columns = shape
    x = torch.randn(sequences, tokens, columns) + torch.randn(columns)
    g = torch.randn(sequences, tokens, rows) + torch.randn(rows)
    return x.to(dtype), g.to(dtype)


def gradients(x: Tensor, g: Tensor) -> list[Tensor]:
    return [output.double().t() @ inputs.double() for inputs, output in zip(x, g, strict=True)]


def by_reference(call: Callable[[], object]) -> Callable[[], object]:
    def forced() -> None:
        with force_backend("reference"):
            call()

    return forced


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_diagonal(benchmark, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, g = make(shape, dtype)
    sequences, tokens, rows, columns = shape
    want = torch.zeros(rows, columns, dtype=torch.float64)
    for gradient in gradients(x, g):
        want.addcmul_(gradient, gradient)
    acc, theirs = torch.zeros(rows, columns), torch.zeros(rows, columns)
    with force_backend("cpu"):
        error = float((fisher_diag_(acc, x, g).double() - want).norm() / want.norm())

    def per_sequence() -> None:
        for inputs, output in zip(x, g, strict=True):
            gradient = output.float().t() @ inputs.float()
            theirs.add_(gradient.square())

    with force_backend("cpu"):
        measure(
            benchmark,
            lambda: fisher_diag_(acc, x, g),
            {"torch per sequence": per_sequence, "reference": by_reference(lambda: fisher_diag_(theirs, x, g))},
            error=error,
            bound=BOUND,
            flops=2 * sequences * tokens * rows * columns,
        )


@pytest.mark.parametrize("form", ["direct", None], ids=["direct", "automatic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trace(benchmark, shape: tuple[int, int, int, int], form: Literal["direct"] | None) -> None:
    """The direct form is msp's own; if the automatic form is the Gram form, the reference serves it."""
    x, g = make(shape, torch.float32)
    want = sum(float(gradient.square().sum()) for gradient in gradients(x, g))
    error = abs(float(fisher_trace(x, g, form=form)) / want - 1)

    def per_sequence() -> Tensor:
        squares = [(output.t() @ inputs).square().sum() for inputs, output in zip(x, g, strict=True)]
        return torch.stack(squares).sum()

    measure(
        benchmark,
        lambda: fisher_trace(x, g, form=form),
        {"torch per sequence": per_sequence, "reference": by_reference(lambda: fisher_trace(x, g, form=form))},
        error=error,
        bound=BOUND,
    )
