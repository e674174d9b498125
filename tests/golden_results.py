"""Results that must not depend on the versions beneath msp: masks, packed bytes, allocations, tokens, and figures.

All inputs are made of the raw bits of NumPy's PCG64, whose stream is promised to stay; ``torch.randn`` and even
``Generator.integers`` are not. ``results`` has two parts:

- ``exact``: integers, and floats whose every step is exact or rounded once. Weights and inputs are small multiples of
  a power of two, so their sums are the same in any order. Allocations, the masks of a model's linears and generated
  tokens are chosen by comparing inexact floats; the choices lie far enough apart to be the same as well.
- ``close``: figures that are sums of inexact products. Every torch, BLAS and instruction set rounds them its own way.

``python tests/golden_results.py`` compares this environment with ``golden/results.json``; ``--renew`` writes that file
and the packed model beside it; ``--save DIR`` also saves the model that is packed here, and ``--load DIR ...`` decodes
with models that others saved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers import __version__ as transformers_version

import msp
from msp import search
from msp.allocators import allocator_names
from msp.base.hashes import hash_tensor
from msp.base.safetensors_files import read_headers, tensor_files
from msp.engine import candidates
from msp.formats.patterns import NMPattern
from msp.ops import nm_rank
from msp.packed.info import validate_packed
from msp.pruners import LinearStatistics, get_pruner, pruner_names
from msp.text.token_sets import save_tokens

GOLDEN = Path(__file__).parent / "golden"
FILE = GOLDEN / "results.json"
PACKED = GOLDEN / "packed"

VOCABULARY = 64
WINDOW = 16
PROMPT = [[5, 17, 40, 23, 9, 31]]
NEW_TOKENS = 24
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What the figures of two environments may differ by, as a share; a KL is a small difference of large numbers.
TOLERANCE = 1e-5


def bits(seed: int, *shape: int, width: int = 16) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Integers of ``width`` random bits."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return (raw >> np.uint64(64 - width)).astype(np.int64).reshape(shape)


def grid(seed: int, *shape: int, width: int = 8, unit: float = 1.0) -> torch.Tensor:
    """fp32: odd multiples of ``unit`` with ``width`` bits and both signs; none is 0, and bf16 holds 8 bits."""
    return torch.from_numpy(2 * bits(seed, *shape, width=width) + 1 - (1 << width)).float() * unit


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the bytes, dtypes and shapes, shortened: nothing of msp checks itself here."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def statistics(rows: int, columns: int, seed: int) -> LinearStatistics:
    """Of integer inputs: every sum is exact."""
    inputs = grid(seed, 3 * columns, columns, width=4) * torch.from_numpy(1 << bits(seed + 1, columns, width=2)).float()
    return LinearStatistics(
        tokens=len(inputs),
        input_sum_squares=inputs.square().sum(0),
        hessian=inputs.T @ inputs,
        fisher=torch.from_numpy(bits(seed + 2, rows, columns, width=12)).float() / 4096,
        sequences=4,
    )


def of_tensors() -> tuple[dict[str, Any], dict[str, Any]]:
    """What pruners, ranks and hashes make of one weight."""
    rows, columns = 24, 96
    about, weight = statistics(rows, columns, 11), grid(7, rows, columns, unit=2.0**-7)
    masks: dict[str, str] = {}
    ranks: dict[str, str] = {}
    swept: dict[str, list[float]] = {}
    for name in pruner_names():
        pruner = get_pruner(name)
        for dtype in DTYPES:
            stored = weight.to(dtype)
            for pattern in map(NMPattern.parse, ("2:4", "1:8", "3:8", "2:16", "7:32")):
                packed = pruner.prune(stored, about, pattern)
                case = f"{name} {pattern} {str(dtype).removeprefix('torch.')}"
                if not pruner.updates_weights:
                    masks[case] = digest(packed.bitmask, packed.values)
                elif dtype == torch.float32:
                    masks[case] = digest(packed.bitmask)
                    swept[case] = packed.values.double().square().sum(1).tolist()
        if not pruner.updates_weights:
            scoring = pruner.scoring(weight, about).kwargs()
            ranks |= {f"{name} of {m}": digest(nm_rank(weight, m, **scoring)) for m in (4, 8, 16, 32)}
    hashes = {str(dtype).removeprefix("torch."): hash_tensor(weight.to(dtype)) for dtype in DTYPES}
    return {"masks": masks, "ranks": ranks, "hashes": hashes}, {"squares of swept rows": swept}


def save_model(path: Path) -> None:
    """A Llama of two blocks and no tokenizer, every weight a multiple of a power of two."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {
        name: 1 + grid(seed, *tensor.shape, unit=2.0**-10) if tensor.ndim == 1 else spread(seed, *tensor.shape)
        for seed, (name, tensor) in enumerate(sorted(model.state_dict().items()), 100)
    }
    model.load_state_dict(state)
    model.save_pretrained(path)


def spread(seed: int, *shape: int) -> torch.Tensor:
    """Weights of which few are large: the sum of two even draws, cubed, is exact in fp32."""
    return (grid(seed, *shape, width=6, unit=2.0**-6) + grid(seed + 5000, *shape, width=6, unit=2.0**-6)).pow(3) / 4


def of_a_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What searches and prunes make of it; the packed model lies in ``folder / "packed"`` afterwards."""
    save_model(folder / "model")
    # every token but the first follows from the one before it and a bit of chance
    draws, tokens = bits(1, 4096, width=3), [7]
    for draw in draws:
        tokens.append(3 + (5 * tokens[-1] + int(draw) ** 2) % (VOCABULARY - 3))
    save_tokens(torch.tensor(tokens), folder / "tokens.safetensors")
    common: dict[str, Any] = {
        "sparsity": 0.7,
        "calibration": str(folder / "tokens.safetensors"),
        "window": WINDOW,
        "calibration_tokens": 512,
        "fitness_tokens": 512,
        "test_tokens": 512,
        "evaluations": 64,
        "device": "cpu",
        "dtype": "float32",
    }
    exact: dict[str, Any] = {"allocations": {}}
    close: dict[str, Any] = {"losses": {}}
    for allocator in allocator_names():
        found = search(folder / "model", allocator=allocator, **common)
        exact["allocations"][allocator] = found.allocation.to_strings()
        if found.loss is not None:
            close["losses"][allocator] = found.loss
    work = folder / "work"
    search(folder / "model", candidates="database", work_dir=work, **common)
    exact["database"] = {
        file.stem: {name: header.shape for name, header in sorted(read_headers([file]).items())} | _metadata(file)
        for file in sorted((work / "database").glob("*.safetensors"))
    }
    for pruner in pruner_names():
        out = folder / "packed" if pruner == "wanda" else folder / pruner
        result = msp.prune(folder / "model", output=out, pruner=pruner, allocator="ramp", **common)
        close[pruner] = {"kl": result.kl, **result.perplexity}
        manifest = validate_packed(out).manifest
        if pruner == "sparsegpt":
            continue
        exact[f"packed by {pruner}"] = {
            "hashes": dict(manifest.hashes),
            "allocation": manifest.to_dict()["allocation"],
            "shapes": manifest.to_dict()["shapes"],
            "bytes": result.bytes,
            "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in tensor_files(out)},
        }
    exact["tokens"] = generated(folder / "packed")
    return exact, close


def _metadata(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as reader:
        return {"hashes": dict(sorted((reader.metadata() or {}).items()))}


def generated(path: Path) -> list[int]:
    """The tokens that a packed model decodes greedily, with a cache; its hashes and positions are checked."""
    loaded = msp.load_model(path, dtype="float32", device="cpu").model
    assert isinstance(loaded, PreTrainedModel)
    prompt = torch.tensor(PROMPT)
    out = loaded.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=1
    )
    return [int(token) for token in out[0, prompt.shape[1] :]]


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="msp-golden-") as folder:
        yield Path(folder)


def results(folder: Path) -> dict[str, Any]:
    """All of it, as JSON would give it back.

    A search on a processor with products in bf16 takes those, and so finds other allocations than on any other one.
    Here it does not.
    """
    exact, close = of_tensors()
    with patch.object(candidates, "forward_in_bf16", lambda model: False):
        more_exact, more_close = of_a_model(folder)
    return json.loads(json.dumps({"exact": exact | more_exact, "close": close | more_close}))


def different(found: Any, wanted: Any, tolerance: float = 0.0, at: str = "") -> list[str]:
    """The places where ``found`` is not ``wanted``, each with both values."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [text for key in keys for text in different(found.get(key), wanted.get(key), tolerance, f"{at}/{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted) and tolerance:
        pairs = enumerate(zip(found, wanted, strict=True))
        return [text for i, (one, other) in pairs for text in different(one, other, tolerance, f"{at}/{i}")]
    if isinstance(wanted, float) and isinstance(found, float) and tolerance:
        same = abs(found - wanted) <= tolerance * abs(wanted)
    else:
        same = type(found) is type(wanted) and found == wanted
    return [] if same else [f"{at}: {found!r}, golden is {wanted!r}"]


def compare(found: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    exact = different(found["exact"], golden["exact"], at="exact")
    return exact + different(found["close"], golden["close"], TOLERANCE, at="close")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path, nargs="+", default=[])
    asked = parser.parse_args(arguments)
    golden = json.loads(FILE.read_text()) if FILE.exists() else {"exact": {}, "close": {}}
    if asked.load:
        wrong = [
            f"{path.name}: {tokens}" for path in asked.load if (tokens := generated(path)) != golden["exact"]["tokens"]
        ]
        print(f"{len(asked.load)} models loaded", *wrong, sep="\n")
        return bool(wrong)
    with scratch() as folder:
        found = results(folder)
        if asked.renew:
            FILE.parent.mkdir(exist_ok=True)
            FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            shutil.rmtree(PACKED, ignore_errors=True)
        for place in [*([PACKED] if asked.renew else []), *([asked.save] if asked.save else [])]:
            shutil.copytree(folder / "packed", place, dirs_exist_ok=True)
    wrong = [] if asked.renew else compare(found, golden)
    print(
        f"torch {torch.__version__}, transformers {transformers_version}: {len(wrong)} results differ", *wrong, sep="\n"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
