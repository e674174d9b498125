"""``fisher_trace`` in both forms, compared with cuBLAS, and its cost in the backward pass of a whole model."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from gpu.bench_fisher_diag import SHAPES, gradients, inputs
from gpu.runner import Context, Measured, Planned
from msp.evidence.fisher import fisher_traces
from msp.models.structure import find_structure
from msp.ops import fisher_trace
from msp.ops.fisher_trace import gram_is_cheaper, op


def measured(context: Context, shape: tuple[int, int, int, int], gram: bool) -> Measured:
    sequences, tokens, height, width = shape
    nbytes = 2 * sequences * tokens * (height + width)
    pairs = context.rotate(lambda: inputs(context, shape), nbytes)
    wanted = sum(float(gradient.square().sum()) for gradient in gradients(*pairs[0]))

    def per_sequence(turn: int) -> list[Tensor]:
        return [(g.t() @ x).float().square().sum() for x, g in zip(*pairs[turn], strict=True)]

    form: Literal["gram", "direct"] = "gram" if gram else "direct"
    with context.backend("triton"):
        return context.measure(
            # without the search for NaN, which waits for a result
            lambda turn: op(*pairs[turn], gram),
            {"cuBLAS + square + sum": per_sequence},
            error=abs(float(fisher_trace(*pairs[0], form=form)) / wanted - 1),
            bound=1e-2,
            moved=nbytes,
            flops=sequences * tokens * ((tokens + 128) * (height + width) if gram else 2 * height * width),
            turns=len(pairs),
        )


def model_measured(context: Context, sizes: tuple[int, ...]) -> Measured:
    """Random weights; the error is the largest of a linear's trace, against squares of autograd's gradient."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, inner, heads, vocabulary, count, tokens = sizes
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
    )
    with torch.device(context.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    linears = find_structure(model).linears
    windows = torch.randint(vocabulary, (count, tokens), device=context.device)

    def plain() -> None:
        for window in windows:
            model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

    plain_seconds, plain_bytes = timed(context, plain)
    seconds, more_bytes = timed(context, lambda: fisher_traces(model, linears, windows))
    model(input_ids=windows[:1], labels=windows[:1], use_cache=False).loss.backward()
    wanted = {linear.name: float(linear.module.weight.grad.float().square().sum()) for linear in linears}
    found = fisher_traces(model, linears, windows[:1])
    return Measured(
        # autograd rounds to bf16, and attention's backward pass adds up in another order each time
        error=max(abs(found[name] / wanted[name] - 1) for name in found) if all(wanted.values()) else math.nan,
        bound=2e-2,
        median_us=seconds * 1e6,
        method="clock",
        extra={"time": seconds / plain_seconds, "more_gb": max(0.0, (more_bytes - plain_bytes) / 1e9)},
    )


def timed(context: Context, call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of the second run and peak bytes."""
    call()
    context.synchronize()
    if not context.dry:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    context.synchronize()
    seconds = time.perf_counter() - start
    return seconds, 0 if context.dry else torch.cuda.max_memory_allocated()


def rows(context: Context) -> Iterator[Planned]:
    # layers, hidden, inner, heads, vocabulary, sequences, tokens
    (sizes,) = context.sizes([(32, 4096, 11008, 32, 32000, 32, 2048)], small=[(1, 32, 64, 2, 64, 2, 16)])
    yield Planned(
        "Fisher trace of a model",
        "Llama {}x{}, {}x{}".format(*sizes[:2], *sizes[-2:]),
        functools.partial(model_measured, context, sizes),
        ("fisher-trace-time", "fisher-trace-memory"),
    )
    for shape in context.sizes(SHAPES, small=[(2, 16, 16, 24)]):
        for gram in (False, True):
            name = f"fisher_trace {'gram' if gram else 'direct'} bf16"
            picked = ", picked" if gram == gram_is_cheaper(*shape[1:]) else ""
            measure = functools.partial(measured, context, shape, gram)
            yield Planned(name + picked, "x".join(map(str, shape)), measure)
