"""The error of a decode table's predictions: the linears of a random Llama, dense and with two allocations.

    python benchmarks/decode_prediction.py [--save]

The table is measured first, as by ``msp measure``. Two allocators then meet half of the dense model's predicted time.
The linears of the packed model are timed twice: one after another in the order of the model, and inside its decode
steps (one token, no cache), by hooks around every linear. Times are medians. ``--save`` writes
``benchmarks/results/decode-prediction.json``, the table included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from runner import machine
from transformers import AutoModelForCausalLM, LlamaConfig

from msp.allocators import Problem, get_allocator
from msp.base.files import write_text
from msp.evidence.decode_times import measure_decode
from msp.formats.storage import DENSE
from msp.models.structure import find_structure
from msp.ops import nm_select
from msp.packed.checkpoint import replace_linears
from msp.plan.plans import Goal, PatternRules, make_plan

RESULTS = Path(__file__).resolve().parent / "results" / "decode-prediction.json"
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
}
PASSES = 100


def build() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).eval()


@torch.inference_mode()
def one_after_another(model: Any, names: list[str]) -> float:
    linears = [model.get_submodule(name) for name in names]
    inputs = [torch.randn(1, 1, linear.in_features, dtype=torch.bfloat16) for linear in linears]
    passes = []
    for _ in range(PASSES):
        start = time.perf_counter()
        for linear, x in zip(linears, inputs, strict=True):
            linear(x)
        passes.append(time.perf_counter() - start)
    return statistics.median(passes[1:])


@torch.inference_mode()
def in_a_step(model: Any, names: list[str]) -> float:
    spent = [0.0]

    def before(*_: Any) -> None:
        spent[-1] -= time.perf_counter()

    def after(*_: Any) -> None:
        spent[-1] += time.perf_counter()

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(before)
        model.get_submodule(name).register_forward_hook(after)
    for _ in range(PASSES):
        spent.append(0.0)
        model(input_ids=torch.tensor([[7]]), use_cache=False)
    return statistics.median(spent[2:])


def rows() -> Iterator[dict[str, Any]]:
    """The table, then the predicted and the measured times."""
    structure = find_structure(build())
    names = [linear.name for linear in structure.linears]
    shapes = [linear.shape for linear in structure.linears]
    rules = PatternRules.parse(8)
    table = measure_decode(shapes, rules.patterns, dtype=torch.bfloat16, device=torch.device("cpu"))
    yield table.to_json()
    dense = sum(table.nanoseconds(shape, DENSE) for shape in shapes)
    plan = make_plan(structure, Goal(None, nanoseconds=dense // 2, table=table.rounded(shapes)), rules)
    problem = Problem(plan.units, plan.budget, evidence=None)  # type: ignore[arg-type]  # neither asks for any
    for allocator in (None, "uniform", "ramp"):
        model, predicted = build(), dense
        if allocator is not None:
            levels = get_allocator(allocator).allocate(problem).levels
            predicted = problem.cost(levels)
            linears = {linear.name: linear for linear in find_structure(model).linears}
            patterns = {name: p for name, p in plan.allocation(levels).items() if not p.is_dense}
            replace_linears(model, {name: nm_select(linears[name].weight, p) for name, p in patterns.items()})
        measured = {"alone": one_after_another(model, names), "in_a_step": in_a_step(model, names)}
        yield {"allocator": allocator or "dense", "predicted_ms": predicted / 1e6} | {
            f"{how}_ms": seconds * 1e3 for how, seconds in measured.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the results file")
    options = parser.parse_args()
    table, *entries = rows()
    for entry in entries:
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else value for key, value in entry.items()))
    if options.save:
        content = {"machine": machine(), "shape": SHAPE, "rows": entries, "table": table}
        write_text(RESULTS, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
