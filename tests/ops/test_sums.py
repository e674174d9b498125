"""Sums to a single number have the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from msp.ops import fisher_trace
from msp.ops._sums import SERIAL, ordered_sum

THREADS = (1, 2, 3, 8)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5 * SERIAL + 3,), (700, 900), (3, 40_000), (40_000, 3), (7, 60, 300)])
def test_total(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, dtype=dtype)
    found = set()
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.add(float(ordered_sum(tensor)))
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(tensor.double().sum()), rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(127, 192, 192), (127, 512, 192), (300, 192, 512)])
def test_fisher_traces(tokens: int, rows: int, columns: int, form: str) -> None:
    x, g = torch.randn(2, tokens, columns), torch.randn(2, tokens, rows)
    found = set()
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.add(float(fisher_trace(x, g, form=form)))
    assert len(found) == 1
