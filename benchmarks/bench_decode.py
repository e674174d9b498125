"""Decoding with a packed model and its dense one: a Llama of 1B shape with random weights, mixed 75 %.

Both are loaded as a user would, by plain ``from_pretrained``; greedy decoding through ``model.generate``, one sequence,
the same prompt and length. The time to the first token is subtracted, so only the decoding is counted. A process of its
own measures the memory that a loaded model keeps resident.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PROMPT, NEW, RUNS = 32, 24, 5
# vocabulary of Llama 2: the head stays dense, so a larger one would measure the head
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
}


def make(folder: Path) -> None:
    """Write the dense model and the packed one: levels of a ramp over depth, weights kept by magnitude."""
    from fractions import Fraction

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from msp.allocators import Problem, get_allocator
    from msp.models.structure import find_structure
    from msp.ops import nm_select
    from msp.packed.checkpoint import replace_linears, save_packed
    from msp.plan.plans import Goal, PatternRules, make_plan

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder / "dense")
    structure = find_structure(model)
    plan = make_plan(structure, Goal(Fraction(3, 4)), PatternRules.parse(8))
    problem = Problem(plan.units, plan.budget, evidence=None)  # type: ignore[arg-type]  # a ramp asks for none
    allocation = plan.allocation(get_allocator("ramp").allocate(problem).levels)
    linears = {linear.name: linear for linear in structure.linears}
    packed = {name: nm_select(linears[name].weight, pattern) for name, pattern in allocation.items()}
    replace_linears(model, packed)
    save_packed(model, None, folder / "packed", recipe={"sparsity": 0.75, "allocator": "ramp"})


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    import msp  # noqa: F401  # teaches transformers the format

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = None
    return model


def seconds_per_token(model: Any) -> float:
    import torch

    prompt = torch.arange(PROMPT)[None] * 7 % SHAPE["vocab_size"]

    def timed(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return time.perf_counter() - start

    timed(2)
    first = timed(1)
    return (timed(1 + NEW) - min(first, timed(1))) / NEW


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def measured_residence(path: Path) -> int:
    """Bytes that loading the model and decoding with it add to a process that has imported everything."""
    found = subprocess.run(
        [sys.executable, __file__, "--resident", str(path)], check=True, capture_output=True, text=True
    )
    return int(json.loads(found.stdout.splitlines()[-1])["bytes"])


def test_decode(benchmark: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    make(tmp_path)
    models = {name: load(tmp_path / name) for name in ("dense", "packed")}
    ids = torch.arange(PROMPT)[None]
    with torch.inference_mode():
        got, want = (models["packed"](ids).logits.double(), _unpacked_logits(models["packed"], ids).double())
    error = float((got - want).norm() / want.norm())
    assert error < 2e-2, f"the packed model is off by {error:.2g}"
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(RUNS):
        for name, model in models.items():
            times[name].append(seconds_per_token(model))
    medians = {name: statistics.median(values) for name, values in times.items()}
    benchmark.pedantic(lambda: seconds_per_token(models["packed"]), rounds=1)
    models.clear()
    resident = {name: measured_residence(tmp_path / name) for name in medians}
    benchmark.extra_info.update(
        {
            "median_seconds": medians["packed"],
            "tokens_per_second": {name: 1 / value for name, value in medians.items()},
            "ratio": {"dense": medians["dense"] / medians["packed"]},
            "error": error,
            "bound": 2e-2,
            "resident_bytes": resident,
            "resident_ratio": resident["packed"] / resident["dense"],
        }
    )


def _unpacked_logits(model: Any, ids: Any) -> Any:
    """The same model with every packed linear computed from its unpacked weight."""
    from msp.ops import force_backend

    with force_backend("reference"):
        return model(ids).logits


def main() -> None:
    if sys.argv[1:2] != ["--resident"]:
        raise SystemExit("run it with pytest; see runner.py")
    import torch
    import transformers  # noqa: F401

    import msp.packed.hf_quantizer  # noqa: F401

    torch.ones(1)
    before = resident_bytes()
    model = load(Path(sys.argv[2]))
    seconds_per_token(model)
    print(json.dumps({"bytes": resident_bytes() - before}))


if __name__ == "__main__":
    main()
