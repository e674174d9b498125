"""Peak host memory of loading, pruning and measuring models, each run in a process of its own.

    python benchmarks/memory.py [--layers 16] [--hidden 1024]
    python benchmarks/memory.py --real MODEL CALIBRATION EVALUATE
    python benchmarks/memory.py --vocabulary wikitext2-test.txt

The first command measures a random Llama and writes ``benchmarks/results/memory.json``. The second adds a real model to
that file. The third measures SmolLM2-135M, whose vocabulary is large, on 8,192 test tokens of a text and writes
``memory-vocabulary.json``. Peak memory is the largest resident set, the pages of mapped weight files included. ``base``
is the memory of the process before it loads weights, as ``dry_run`` counts it (in the third: before any import).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from msp.base.host_memory import peak  # without torch

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = (
    ("uniform", "wanda", 1024),
    ("uniform", "wanda", 4096),
    ("msp", "wanda", 1024),
    ("uniform", "sparsegpt", 1024),
    ("msp", "sparsegpt", 1024),
)

# The first run writes the packed model that the second one measures.
VOCABULARY_RUNS = ("prune", "evaluate packed", "evaluate dense")


def measured(model: Path | str, **options: Any) -> dict[str, Any]:
    """``prune`` with ``options``, and the prediction of ``dry_run`` for it; run in this process."""
    import msp

    options |= {"device": "cpu"}
    expected = msp.dry_run(model, **options)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = msp.prune(model, output=Path(folder) / "packed", **options)
    memory = expected.memory
    assert memory is not None
    record = {"bytes": result.bytes, "kl": result.kl, "perplexity": result.perplexity["pruned"]}
    record |= {"base": memory.base, "predicted": memory.peak, "predicted_stage": memory.stage, "peak": peak()}
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def run(what: str, pruner: str, tokens: int, folder: Path) -> dict[str, Any]:
    """One run of the random model."""
    record: dict[str, Any] = {"run": what, "pruner": pruner, "calibration_tokens": tokens}
    tokens_file = str(folder / "tokens.safetensors")
    sizes = {"window": 128, "calibration_tokens": tokens, "fitness_tokens": 256, "test_tokens": 256}
    options = {"sparsity": 0.75, "allocator": what, "pruner": pruner, "evaluations": 16, **sizes}
    return record | measured(folder / "model", calibration=tokens_file, **options)


def run_real(what: str, model: str, calibration: str, evaluate: str) -> dict[str, Any]:
    """One run of a real model with windows of 256, with the default options except the sizes."""
    record: dict[str, Any] = {"run": what, "model": Path(model).name, "test_tokens": 8192}
    sizes = {"window": 256, "calibration_tokens": 4096, "fitness_tokens": 1024, "test_tokens": 8192}
    options = {"sparsity": 0.5, "allocator": what, "evaluations": 16, **sizes}
    return record | measured(model, calibration=calibration, evaluate=evaluate, **options)


def run_vocabulary(what: str, model: str, text: str, folder: Path) -> dict[str, Any]:
    """One run on 8,192 test tokens in windows of 512, in this process."""
    import msp

    record: dict[str, Any] = {"run": what, "test_tokens": 8192, "base": peak()}
    options: dict[str, Any] = {"evaluate": text, "window": 512, "test_tokens": 8192, "device": "cpu"}
    start = time.perf_counter()
    if what == "prune":
        result = msp.prune(
            model,
            sparsity=0.5,
            output=folder / "packed",
            force=True,
            allocator="uniform",
            pruner="magnitude",
            calibration=text,
            calibration_tokens=512,
            fitness_tokens=0,
            **options,
        )
        figures = {"kl": result.kl, "perplexity": result.perplexity["pruned"]}
    else:
        packed_or_dense = folder / "packed" if what == "evaluate packed" else model
        found = msp.evaluate(packed_or_dense, reference=model, **options)
        figures = {name: getattr(found, name) for name in ("kl", "perplexity")}
    return record | figures | {"seconds": round(time.perf_counter() - start, 1), "peak": peak()}


def make(folder: Path, layers: int, hidden: int) -> int:
    """A random model in bf16 and random tokens; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from msp.text.token_sets import save_tokens

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=4096,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    save_tokens(torch.randint(0, 4096, (20_000,)), folder / "tokens.safetensors")
    return sum(parameter.numel() for parameter in model.parameters())


def in_own_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(record, flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", metavar="TEXT", help="measure SmolLM2-135M on this text instead")
    parser.add_argument("--output", type=Path, help="the file to write, in place of the one in benchmarks/results")
    parser.add_argument("--run", nargs=4, metavar=("WHAT", "PRUNER", "TOKENS", "FOLDER"), help="one run, here")
    parser.add_argument("--run-vocabulary", nargs=4, metavar=("WHAT", "MODEL", "TEXT", "FOLDER"), help="one run, here")
    parser.add_argument("--real", nargs=3, metavar=("MODEL", "CALIBRATION", "EVALUATE"), help="measure this model too")
    parser.add_argument("--run-real", nargs=4, metavar=("WHAT", "MODEL", "TEXT", "TEXT"), help="one run, here")
    options = parser.parse_args()
    if options.run_real:
        print(json.dumps(run_real(*options.run_real)))
        return
    if options.run:
        what, pruner, tokens, folder = options.run
        print(json.dumps(run(what, pruner, int(tokens), Path(folder))))
        return
    if options.run_vocabulary:
        what, model, text, folder = options.run_vocabulary
        print(json.dumps(run_vocabulary(what, model, text, Path(folder))))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    content: dict[str, Any] = {"commit": commit.stdout.strip()}
    with tempfile.TemporaryDirectory() as name:
        if options.vocabulary:
            import models

            file, model = "memory-vocabulary.json", str(models.smollm2())
            content |= {"model": Path(model).name, "text": Path(options.vocabulary).name}
            records = [
                in_own_process("--run-vocabulary", what, model, options.vocabulary, name) for what in VOCABULARY_RUNS
            ]
        elif options.real:
            file = "memory.json"
            content = json.loads((options.output or RESULTS / file).read_text())
            found = [in_own_process("--run-real", what, *options.real) for what in ("uniform", "msp")]
            records = content.pop("runs") + [{"commit": commit.stdout.strip(), **record} for record in found]
        else:
            file = "memory.json"
            content |= {"parameters": make(Path(name), options.layers, options.hidden), "layers": options.layers}
            records = [in_own_process("--run", what, pruner, str(tokens), name) for what, pruner, tokens in RUNS]
    output = options.output or RESULTS / file
    output.parent.mkdir(parents=True, exist_ok=True)
    from msp.base.files import write_text  # not before: it takes memory

    write_text(output, json.dumps(content | {"runs": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
