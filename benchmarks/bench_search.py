"""The search, compared with the bare forward of its model on as many tokens, and the shares of the rest of its time.

Fitness takes a forward, the logarithm of the probabilities and their divergence from the dense model's. Everything else
is overhead: setting the levels of candidates (``nm_keep`` on every linear that changes), and the engine, which breeds,
repairs, ranks and records.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import pytest
import torch
from quality_cells import SHARED, TESTBEDS, Cell, token_sets
from runner import seconds_of, take_turns

from msp.allocators import Allocated, get_allocator
from msp.allocators.evolution import search
from msp.base.progress import NoProgress
from msp.engine.candidates import CandidateModel, LocalRunner, forward_in_bf16
from msp.engine.evolution import EvolutionOptions
from msp.evidence.evaluate import DenseReference
from msp.models.as_loaded import FLOAT32
from msp.models.loading import load_model
from msp.models.structure import find_structure
from msp.plan.plans import Goal, PatternRules, make_plan, patterns_of
from msp.pruners import get_pruner
from msp.session.options import Options
from msp.session.workbench import Workbench
from msp.text.token_sets import TokenSets

# Large enough that its matrix products look like those of a large model.
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
FITNESS_TOKENS = 8192
# Without the emptied blocks of the first population, which would be most of so short a search. Without sensitivities:
# they take far longer than two generations, and their bookkeeping is that of any candidate.
SHORT = replace(EvolutionOptions(), generations=2, offspring=4, emptied=0, patience=0)
TURNS = 2
# The limit for the error of the search's KL; with bf16 products it is off by about 1e-4 of 1.
BOUND = 2e-3


def wiki6m() -> tuple[Any, TokenSets]:
    bed = TESTBEDS["wiki6m"]
    if not (SHARED / bed.path).exists():
        pytest.skip(f"{SHARED / bed.path} is not there")
    loaded = load_model(SHARED / bed.path, device=torch.device("cpu"))
    return loaded.model, token_sets(loaded, Cell().setting() | {"fitness_tokens": FITNESS_TOKENS})


def random_llama() -> tuple[Any, TokenSets]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
    # half the tokens: a forward of this one takes three times as long
    windows = torch.randint(SHAPE["vocab_size"], (FITNESS_TOKENS // 2 // 256, 256))
    return model, TokenSets(windows, windows, windows, 256, {})


@contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """Seconds of every call of a method."""
    method, seconds = getattr(owner, name), []

    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    with patch.object(owner, name, call):
        yield seconds


def precision(model: Any) -> AbstractContextManager[Any]:
    """The dtype in which candidates are computed."""
    return torch.autocast("cpu", torch.bfloat16) if forward_in_bf16(model) else nullcontext()


def bare_forward(model: Any, reference: DenseReference, tokens: int) -> None:
    """The forward of as many tokens as a search, in batches of the same size."""
    size = reference.batch_size * reference.windows.shape[1]
    with torch.inference_mode(), precision(model):
        for batch in range(tokens // size):
            start = batch % reference.batches * reference.batch_size
            model(input_ids=reference.windows[start : start + reference.batch_size], use_cache=False)


def forward_and_loss(model: Any, reference: DenseReference, tokens: int) -> None:
    size = reference.batch_size * reference.windows.shape[1]
    with precision(model):
        reference.sums(model, [batch % reference.batches for batch in range(tokens // size)])


def masked_kl(bench: Workbench, found: Allocated, ranks: Any) -> float:
    """The KL of levels, computed from masked copies of the weights."""
    dense = {linear.name: linear.weight.clone() for linear in bench.linears}
    for unit, level in zip(bench.plan.units, found.levels, strict=True):
        for linear in (linear for linear in bench.linears if linear.name in unit.linears):
            pattern = patterns_of(unit)[level]
            linear.weight.mul_(ranks[linear.name][pattern.m] < pattern.n)
    kl = bench.reference().measure(bench.model).kl
    for linear in bench.linears:
        linear.weight.copy_(dense[linear.name])
    return kl


def measure_search(model: Any, tokens: TokenSets, *, turns: int = TURNS) -> dict[str, Any]:
    """One row: the search, the bare forward and the forward with the loss, in turn and on the same number of tokens."""
    structure = find_structure(model)
    plan = make_plan(structure, Goal(Fraction(3, 4)), PatternRules.parse(8))
    options = {"name": "bench", "stored": FLOAT32, "device": torch.device("cpu"), "progress": NoProgress()}
    bench = Workbench(model, structure, plan, tokens, **options)
    problem = bench.problem(Options.parse(sparsity=0.75), get_pruner("wanda"))
    reference, ranks = bench.reference(), problem.evidence.ranks()
    seeds = [get_allocator("uniform").allocate(problem).levels]

    ours = functools.partial(search, problem, seeds, SHORT)
    with timed(LocalRunner, "run") as runs, timed(CandidateModel, "apply") as applied:
        start = time.perf_counter()
        found = ours()
        whole = time.perf_counter() - start
    assert applied, "no candidate was applied: the shares would be wrong"
    error = abs(found.history[-1].best / masked_kl(bench, found, ranks) - 1)
    assert error <= BOUND, f"the search is off by {error:.2g}: no speed is worth reporting"

    calls = {
        "ours": ours,
        "bare forward": functools.partial(bare_forward, model, reference, found.tokens),
        "forward and loss": functools.partial(forward_and_loss, model, reference, found.tokens),
    }
    times = take_turns({name: functools.partial(seconds_of, call) for name, call in calls.items()}, turns)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "median_seconds": medians["ours"],
        "error": error,
        "bound": BOUND,
        "ratio": {name: medians[name] / medians["ours"] for name in calls if name != "ours"},
        "candidates_per_second": found.evaluations / medians["ours"],
        "tokens_per_second": {name: found.tokens / value for name, value in medians.items()},
        "share": {"setting levels": sum(applied) / whole, "engine": 1 - sum(runs) / whole},
    }


@pytest.mark.parametrize("make", [wiki6m, random_llama], ids=["wiki6m", "llama-512x8"])
def test_search(benchmark: Any, make: Any) -> None:
    model, tokens = make()
    row = benchmark.pedantic(measure_search, (model, tokens), rounds=1)
    benchmark.extra_info.update(row)
