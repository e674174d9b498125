"""A model larger than the allowed memory: streamed, and not streamed under the same limit.

    python benchmarks/streaming.py [search | prune] [--layers 32] [--hidden 1024] [--limit 1.2]

Writes ``benchmarks/results/streaming.json`` for a search, ``streaming-prune.json`` for SparseGPT to an allocation.
Every run has a process of its own. The limit is RLIMIT_DATA. The kernel counts all private writable pages that a
process asked for, touched or not: its allocations, and the mapped weight files while they are open. Resident memory is
sampled every 10 ms: ``anonymous`` pages are held; pages of mapped files are clean, so the kernel takes them back when
it needs room.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
FILES = {"search": "streaming.json", "prune": "streaming-prune.json"}
VOCABULARY = 8192
TEXT: dict[str, Any] = {
    "window": 64,
    "calibration_tokens": 64,
    "fitness_tokens": 64,
    "test_tokens": 64,
    "device": "cpu",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "search": {**TEXT, "sparsity": 0.75, "evaluations": 16},
    "prune": {**TEXT, "pruner": "sparsegpt"},
}
RECIPE = """
pruning_stage:
  pruning_modifiers:
    NMPruningModifier:
      patterns: {"re:.*": "2:8"}
"""


class Peaks(threading.Thread):
    """The largest value so far of fields of ``/proc/self/status``, in bytes."""

    FIELDS = ("RssAnon", "VmData", "VmHWM")

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen = dict.fromkeys(self.FIELDS, 0)
        self.sample()

    def run(self) -> None:
        while True:
            self.sample()
            time.sleep(0.01)

    def sample(self) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for field in self.FIELDS:
            self.seen[field] = max(self.seen[field], int(status[field].split()[0]) * 1024)


def run(verb: str, stream: bool, limit: int, folder: Path) -> dict[str, Any]:
    """One search, or one pruning to 2:8, in this process."""
    import msp
    from msp.engine.streaming import StreamingRunner

    runners: list[StreamingRunner] = []
    measure = StreamingRunner.run

    def remembered(self: StreamingRunner, jobs: Any) -> Any:
        runners[:] = [self]
        return measure(self, jobs)

    StreamingRunner.run = remembered  # type: ignore[method-assign]
    peaks = Peaks()
    record: dict[str, Any] = {"stream": stream, "limit": limit, "base": dict(peaks.seen)}
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    peaks.start()
    start = time.perf_counter()
    options: dict[str, Any] = {"stream": True, "hidden_bytes": "32MB", "work_dir": folder / "work"} if stream else {}
    options |= {"calibration": str(folder / "tokens.safetensors"), **OPTIONS[verb]}
    if verb == "prune":
        options |= {"allocation": folder / "recipe.yaml", "output": folder / f"packed-{stream}"}
    found: Any
    try:
        found = getattr(msp, verb)(folder / "model", **options)
    except (MemoryError, RuntimeError, msp.MspError) as error:
        return record | {"failed": str(error).splitlines()[0][:200]}
    record |= {"seconds": time.perf_counter() - start, "peak": peaks.seen}
    if verb == "prune":
        return record | {"kl": found.kl, "bytes": found.bytes}
    record |= {"best": found.history[-1]["best"], "candidates": found.history[-1]["evaluations"]}
    if runners:
        record |= {"block_loads": runners[0].loads, "hidden_bytes": runners[0].peak_bytes}
    return record


def make(folder: Path, layers: int, hidden: int) -> int:
    """A random float32 model in many files and random tokens; returns the bytes of its weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from msp.text.token_sets import save_tokens

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model", max_shard_size="100MB")
    save_tokens(torch.randint(0, VOCABULARY, (20_000,)), folder / "tokens.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return sum(parameter.nbytes for parameter in model.parameters())


def in_process(verb: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, verb, "--child", *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=FILES, default="search")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=1.2, help="in GB")
    parser.add_argument("--folder", type=Path, help="temporary folder for the model")
    parser.add_argument("--child", nargs="+", help="one step, here")
    options = parser.parse_args()
    if options.child:
        step, folder, *numbers = options.child
        done = (
            make(Path(folder), *map(int, numbers))
            if step == "make"
            else run(options.verb, step == "stream", int(numbers[0]), Path(folder))
        )
        print(json.dumps(done))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    limit = int(options.limit * 1e9)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        size = in_process(options.verb, "make", name, options.layers, options.hidden)
        print(f"model: {size:,} bytes, limit: {limit:,}", flush=True)
        runs = [in_process(options.verb, step, name, held) for step, held in (("stream", limit), ("whole", limit))]
    for record in runs:
        print(record, flush=True)
    content = {
        "commit": commit.stdout.strip(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "model_bytes": size,
        "layers": options.layers,
        "hidden": options.hidden,
        options.verb: OPTIONS[options.verb],
        "runs": runs,
    }
    from msp.base.files import write_text  # not before: it takes memory

    write_text(RESULTS / FILES[options.verb], json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
