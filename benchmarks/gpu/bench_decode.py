"""Greedy decoding with a packed model and its dense one: Llama-2-7B's shape, random weights, mixed 75 %, batch 1.

Both go through ``model.generate`` with a static cache, ``torch.compile`` and CUDA graphs. The time to the first token
is subtracted, so only the decoding is counted; memory is the allocation of the loaded model and its decoding. The error
is that of the logits of the same decoding, against the reference on the generated tokens.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch

from gpu.runner import Context, Measured, Planned, relative_error
from msp.allocators import Problem, get_allocator
from msp.models.structure import find_structure
from msp.ops import force_backend, nm_select
from msp.packed.checkpoint import replace_linears
from msp.packed.sparse_linear import SparseLinear, fast_decode
from msp.plan.plans import Goal, PatternRules, make_plan

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
PROMPT, NEW, RUNS = 32, 64, 5
# The roundings to bf16 in all blocks, of products and of attention; a wrong kernel is off by the size of its result.
BOUND = 5e-2


def rows(context: Context) -> Iterator[Planned]:
    (size,) = context.sizes(["Llama-2-7B"], small=["small"])
    measure = functools.partial(measured, context, SMALL if context.dry else LLAMA_2_7B)
    yield Planned("decode mixed 75 % bf16", size, measure, ("decode-speed", "decode-memory"))


def measured(context: Context, shape: dict[str, int]) -> Measured:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(context.seed)
    with context.device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.arange(PROMPT, device=context.device)[None] * 7 % shape["vocab_size"]
    dense_seconds, dense_bytes, _ = decoded(context, model, prompt)
    pack(model)
    seconds, allocated, generated = decoded(context, model, prompt)
    found = torch.stack(generated.logits, dim=1)
    with torch.inference_mode(), force_backend("reference"):
        wanted = model(generated.sequences[:, :-1]).logits[:, -found.shape[1] :]
    error = relative_error(found, wanted)
    if not error <= BOUND:
        return Measured(error, BOUND)
    return Measured(
        error,
        BOUND,
        median_us=seconds * 1e6,
        ratio={"dense": dense_seconds / seconds},
        method="generate" if context.dry else "generate, static cache, CUDA graphs",
        extra={
            "memory": allocated / dense_bytes,
            "memory_gb": allocated / 1e9,
            "tokens_per_second": 1 / seconds,
            "dense_tokens_per_second": 1 / dense_seconds,
        },
    )


def pack(model: Any) -> None:
    """Levels of a ramp over depth, weights kept by magnitude."""
    structure = find_structure(model)
    plan = make_plan(structure, Goal(Fraction(3, 4)), PatternRules.parse(8))
    problem = Problem(plan.units, plan.budget, evidence=None)  # type: ignore[arg-type]  # a ramp asks for none
    allocation = plan.allocation(get_allocator("ramp").allocate(problem).levels)
    linears = {linear.name: linear for linear in structure.linears}
    for name, pattern in allocation.items():  # one by one: the dense weight goes before the next is packed
        replace_linears(model, {name: nm_select(linears.pop(name).weight, pattern)})
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.settle()
    fast_decode(model)


def decoded(context: Context, model: Any, prompt: torch.Tensor) -> tuple[float, int, Any]:
    """Seconds a token, median of a few runs; bytes allocated meanwhile; the result of ``generate`` with logits."""
    from transformers import StaticCache
    from transformers.generation.configuration_utils import CompileConfig

    torch.compiler.reset()
    options = copy.deepcopy(model.generation_config)
    options.do_sample, options.pad_token_id = False, 0
    # One cache for all runs: CUDA graphs use the addresses of its tensors, and another cache needs new graphs.
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 1 + NEW)
    if not context.dry:
        options.compile_config = CompileConfig(mode="reduce-overhead", fullgraph=False, dynamic=False)

    def generate(count: int, **more: bool) -> Any:
        options.max_new_tokens = options.min_new_tokens = count
        mask = torch.ones_like(prompt)
        with torch.inference_mode():
            if cache.is_initialized:
                cache.reset()
            return model.generate(prompt, attention_mask=mask, generation_config=options, past_key_values=cache, **more)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generate(count)
        context.synchronize()
        return time.perf_counter() - start

    for count in (1 + NEW, 1, 1 + NEW):  # compiled, and recorded in graphs
        seconds(count)
    times = [(seconds(1 + NEW) - seconds(1)) / NEW for _ in range(RUNS)]
    gc.collect()
    parts = [*model.parameters(), *model.buffers()]
    allocated = sum(part.nbytes for part in parts) if context.dry else torch.cuda.memory_allocated()
    generated = generate(1 + NEW, output_logits=True, return_dict_in_generate=True)
    return statistics.median(times), allocated, generated
