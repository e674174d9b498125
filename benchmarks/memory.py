"""Peak host memory of loading and of pruning a random Llama, each in a process of its own.

    python benchmarks/memory.py [--layers 16] [--hidden 1024]

Writes ``benchmarks/results/memory.json``. Peak memory is the largest resident set, the pages of mapped
weight files included; ``base`` is that of a process that has imported everything and loaded nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
RUNS = (("load", "", 0), ("uniform", "wanda", 1024), ("uniform", "wanda", 4096), ("msp", "wanda", 1024))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(what: str, pruner: str, tokens: int, folder: Path) -> dict[str, Any]:
    """One run in this process."""
    import msp.pipeline

    record: dict[str, Any] = {"run": what, "pruner": pruner, "calibration_tokens": tokens, "base": peak()}
    if what == "load":
        msp.load_model(folder / "model")
    else:
        result = msp.prune(
            folder / "model",
            sparsity=0.75,
            output=folder / "out",
            force=True,
            allocator=what,
            pruner=pruner,
            calibration=str(folder / "tokens.safetensors"),
            window=128,
            calibration_tokens=tokens,
            fitness_tokens=256,
            test_tokens=256,
            evaluations=16,
            device="cpu",
        )
        record |= {"bytes": result.bytes}
    return record | {"peak": peak()}


def make(folder: Path, layers: int, hidden: int) -> int:
    """A random model in bf16 and random tokens; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from msp.data import save_tokens

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--run", nargs=4, metavar=("WHAT", "PRUNER", "TOKENS", "FOLDER"), help="one run, here")
    options = parser.parse_args()
    if options.run:
        what, pruner, tokens, folder = options.run
        print(json.dumps(run(what, pruner, int(tokens), Path(folder))))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as name:
        parameters = make(Path(name), options.layers, options.hidden)
        records = []
        for what, pruner, tokens in RUNS:
            command = [sys.executable, __file__, "--run", what, pruner, str(tokens), name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            records.append(json.loads(done.stdout.splitlines()[-1]))
            print(records[-1], flush=True)
    content = {"commit": commit.stdout.strip(), "parameters": parameters, "layers": options.layers, "runs": records}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    from msp.files import write_text  # not before: it takes memory

    write_text(RESULTS, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
