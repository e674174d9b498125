"""The cost of the checks of a model during reading: hashes, NaN and infinity, positions at each call.

    python benchmarks/reading.py [--layers 24] [--hidden 2048] [--repeats 5]

Makes a random packed model in bf16 (1 GB by default) in a temporary folder and loads it with and without the hashes, in
turns. Writes ``benchmarks/results/reading.json``. ``cpu_seconds`` are those of all threads of the process, the least of
the repeats. ``wall_seconds`` are the least too, and depend on the other load of the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from runner import commit
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from msp.base.finite import check_finite, named_tensors
from msp.base.hashes import Hashing
from msp.base.safetensors_files import read_headers, tensor_files
from msp.formats.patterns import NMPattern
from msp.formats.positions import check_positions
from msp.ops import nm_select
from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.sparse_linear import SparseLinear

RESULTS = Path(__file__).resolve().parent / "results" / "reading.json"


def make(folder: Path, layers: int, hidden: int) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    packed = {
        name: nm_select(module.weight.detach(), NMPattern(2, 8))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    replace_linears(model, packed)
    save_packed(model, None, folder, recipe={})


def least(repeats: int, **what: Callable[[], object]) -> dict[str, dict[str, float]]:
    """The least CPU and wall seconds of each, measured in turns."""
    found = {name: {"cpu_seconds": float("inf"), "wall_seconds": float("inf")} for name in what}
    for _ in range(repeats):
        for name, run in what.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
            found[name] = {key: min(found[name][key], value) for key, value in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "packed"
        make(folder, options.layers, options.hidden)
        size = sum(file.stat().st_size for file in tensor_files(folder))
        loaded: list[Any] = [None]

        def load(verify: str) -> None:
            loaded[0] = None
            os.environ["MSP_VERIFY"] = verify
            loaded[0] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

        load("0")
        headers = read_headers(tensor_files(folder))
        loads = least(
            options.repeats,
            load_without_hashes=lambda: load("0"),
            load_with_hashes=lambda: load("1"),
            hashes=lambda: Hashing(headers).result(),
            finite=lambda: check_finite(named_tensors(loaded[0])),
        )
        linear = next(module for module in loaded[0].modules() if isinstance(module, SparseLinear))
        linear.packed.check()
        calls = 100_000
        start = time.process_time()
        for _ in range(calls):
            check_positions(linear.bitmask, 2, 8, linear.in_features)
        stamp = (time.process_time() - start) / calls
        data = memoryview(torch.randint(0, 255, (1 << 26,), dtype=torch.uint8).numpy())
        methods = least(
            options.repeats,
            xxh3_64=lambda: xxhash.xxh3_64(data).digest(),
            xxh3_128=lambda: xxhash.xxh3_128(data).digest(),
            crc32=lambda: zlib.crc32(data),
            blake2b=lambda: hashlib.blake2b(data).digest(),
        )
    content = {
        "commit": commit(),
        "bytes": size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        **loads,
        "known_bitmask_seconds_a_call": stamp,
        "gigabytes_a_cpu_second": {name: len(data) / row["cpu_seconds"] / 1e9 for name, row in methods.items()},
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
