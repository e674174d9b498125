"""Every op on a CPU, however called: sizes of one and none, tensors that lie anyhow, threads, many callers at once.

``tests/native/test_native_calls.py`` asks the same of the C++ kernels themselves, on every instruction set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import by_hand
import pytest
import torch
from torch import Tensor

from msp.formats.patterns import NMPattern
from msp.ops import (
    PackedWeight,
    available_backends,
    fisher_diag_,
    fisher_trace,
    force_backend,
    last_backend,
    nm_keep,
    nm_linear,
    nm_rank,
    nm_select,
    obs_prune,
)

PATTERN = NMPattern(3, 8)
# rows, columns: none of either, one of each, no whole number of vectors, enough for every thread
SHAPES = [(0, 40), (3, 0), (1, 8), (37, 168), (290, 1032)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Called:
    """``inputs`` makes the tensors of a ``[rows, columns]`` weight that ``call`` takes.

    What comes out equals the reference's to the bit, or up to ``rtol``; ``served`` is the backend it comes from.
    """

    op: str
    inputs: Callable[[torch.Generator, int, int], tuple[Tensor, ...]]
    call: Callable[..., tuple[Tensor, ...]]
    rtol: float = 0.0
    served: str = "cpu"


def scored(generator, rows, columns):
    return by_hand.weights(rows, columns, torch.bfloat16, generator), torch.rand(columns, generator=generator)


def ranked(generator, rows, columns):
    ranks = torch.rand(rows, columns // 8, 8, generator=generator).argsort(-1).view(rows, columns).byte()
    return by_hand.weights(rows, columns, torch.float16, generator), ranks


def multiplied(tokens):
    def inputs(generator, rows, columns):
        packed = nm_select(by_hand.weights(rows, columns, torch.float32, generator).bfloat16(), PATTERN)
        x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
        return x.bfloat16(), packed.values, packed.bitmask, bias.bfloat16()

    return inputs


def updated(generator, rows, columns):
    factor = torch.randn(columns, columns, generator=generator).triu(1) / max(columns, 1)
    factor += torch.diag(torch.rand(columns, generator=generator) + 0.5)
    return torch.randn(rows, columns, generator=generator), factor


def gradients(generator, rows, columns):
    x, g = (torch.randn(3, 19, size, generator=generator) + 0.5 for size in (columns, rows))
    return torch.rand(rows, columns, generator=generator), x, g


def parts(packed):
    return packed.values, packed.bitmask


def multiply(x, values, bitmask, bias):
    return (nm_linear(x, PackedWeight(values, bitmask, PATTERN, (len(bias), x.shape[1])), bias),)


def trace(form):
    return lambda acc, x, g: (fisher_trace(x, g, form=form),)


CALLED = {
    "nm_select": Called("nm_select", scored, lambda w, s: parts(nm_select(w, PATTERN, column_scale=s))),
    "nm_rank": Called("nm_rank", scored, lambda w, s: (nm_rank(w, 8, column_scale=s),)),
    "nm_keep": Called("nm_keep", ranked, lambda w, rank: (nm_keep(w, rank, 3),)),
    "nm_linear": Called("nm_linear", multiplied(5), multiply, 2.0**-7),
    # more than any path takes at once; where none is for so many, with unpacked rows
    "nm_linear_many": Called("nm_linear", multiplied(1030), multiply, 2.0**-7),
    "obs_prune": Called("obs_prune", updated, lambda w, u: parts(obs_prune(w, u, PATTERN)), 1e-4),
    "fisher_diag_": Called("fisher_diag_", gradients, lambda acc, x, g: (fisher_diag_(acc.clone(), x, g),), 1e-4),
    "fisher_trace": Called("fisher_trace", gradients, trace("direct"), 1e-4),
    "gram": Called("fisher_trace", gradients, trace("gram"), 1e-4, "reference"),
}
every_op = pytest.mark.parametrize("called", CALLED.values(), ids=CALLED.keys())


def shifted(tensor):
    """One element further on in memory than an allocator would have it."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def spread(tensor):
    """Every second number of memory that is poisoned between them."""
    return tensor.new_empty(*tensor.shape, 2)[..., 0].copy_(tensor)


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def assert_same(called, found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=called.rtol, atol=called.rtol * 10)


def prepare(called, seed, rows, columns):
    """Inputs, and what the reference makes of them."""
    if called.served not in available_backends(called.op):
        pytest.skip("the compiled module msp._cpu is not built")
    inputs = called.inputs(torch.Generator().manual_seed(seed), rows, columns)
    with force_backend("reference"):
        return inputs, called.call(*inputs)


@every_op
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, shifted, spread, transposed])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_takes_tensors_of_any_size_that_lie_anyhow(shape, layout, called) -> None:
    inputs, wanted = prepare(called, 1, *shape)
    assert_same(called, called.call(*map(layout, inputs)), wanted)
    if layout in (torch.Tensor.contiguous, shifted) and 0 not in shape:
        assert last_backend(called.op) == called.served


@every_op
def test_gives_the_same_with_any_number_of_threads(called) -> None:
    inputs, wanted = prepare(called, 2, *SHAPES[-1])
    before = torch.get_num_threads()
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            assert_same(called, called.call(*inputs), wanted)
    finally:
        torch.set_num_threads(before)


@every_op
def test_serves_many_threads_of_python_at_once(called) -> None:
    prepared = [prepare(called, seed, *SHAPES[-2]) for seed in range(4)]
    right = [0] * len(prepared)

    def work(which: int) -> None:
        inputs, wanted = prepared[which]
        for _ in range(10):
            assert_same(called, called.call(*inputs), wanted)
            right[which] += 1

    threads = [threading.Thread(target=work, args=(which,)) for which in range(len(prepared))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [10] * len(prepared)
