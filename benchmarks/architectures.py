"""Prunes a tiny random model of every causal architecture of transformers, and loads the result again.

    python benchmarks/architectures.py [llama zamba2 ...]

Each runs in a process of its own and is pruned to 50 % twice: by Wanda with one density for all, and by SparseGPT with
densities by Fisher trace. It passes if the packed model that transformers loads computes the same bits as the one in
memory, and if every linear is in the allocation or has a reason. ``benchmarks/results/architectures.json`` has the
result of each; an architecture with a result for this commit is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from runner import RESULTS, commit

FILE = RESULTS / "architectures.json"
SECONDS, MOST_WEIGHTS = 120, 30_000_000
WORDS = 96
METHODS = (("wanda", "uniform"), ("sparsegpt", "fisher-rank"))

# Sizes for the fields that a configuration has.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_headdim", "n_mamba_heads"), 8),
    **dict.fromkeys(("state_size", "sliding_window", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "mamba_expand"), 2),
    "rotary_dim": 4,
    "is_decoder": True,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
OPTIONS = {"window": 16, "calibration_tokens": 64, "fitness_tokens": 64, "test_tokens": 64, "device": "cpu"}


def architectures() -> list[str]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return sorted(name for name in names if name in CONFIG_MAPPING)


def build(name: str) -> Any:
    """A small random model with larger weights than after an initialisation; errors of the library pass through."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name)
    options = {key: value for key, value in TINY.items() if hasattr(config, key)}
    for without in ((), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads")):
        chosen = {key: value for key, value in options.items() if key not in without}
        try:
            torch.manual_seed(0)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(type(config)(**chosen, **SPECIAL)).num_parameters()
            if size > MOST_WEIGHTS:
                raise ValueError(f"{size:,} weights: parts of its configuration have sizes of their own")
            model = AutoModelForCausalLM.from_config(type(config)(**chosen, **SPECIAL)).eval()
            with torch.no_grad():
                model(input_ids=torch.arange(8)[None], use_cache=False)
            break
        except Exception as error:
            failure = error
    else:
        raise failure
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def run(name: str) -> dict[str, Any]:
    """The result for ``name``, computed in this process."""
    import torch
    import transformers

    import msp
    from msp.models.structure import find_structure
    from msp.text.token_sets import save_tokens

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = build(name)
    except Exception as error:
        return {"not_built": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
    structure = find_structure(model)
    places = {place.name for linear in structure.linears for place in linear.places}
    linears = {each for each, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found: dict[str, Any] = {"blocks": len(structure.blocks), "linears": len(structure.linears)}
    found["untold"] = sorted(linears - places - {key.removesuffix(".weight") for key in structure.skipped})
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        model.save_pretrained(folder / "dense")
        save_tokens(torch.randint(3, WORDS, (4000,)), folder / "tokens.safetensors")
        prompt = torch.randint(3, WORDS, (2, 16))
        for pruner, allocator in METHODS:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                tokens = str(folder / "tokens.safetensors")
                made = {"sparsity": 0.5, "pruner": pruner, "allocator": allocator, "calibration": tokens, **OPTIONS}
                result = msp.prune(folder / "dense", output=folder / pruner, **made)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / pruner).eval()
            with torch.no_grad():
                one, other = (each(input_ids=prompt, use_cache=False).logits for each in (result.model, loaded))
            ours = [
                str(each.message) for each in told if "/msp/" in each.filename or "calibration" in str(each.message)
            ]
            found[pruner] = {"kl": result.kl, "loads_equal": bool(torch.equal(one, other)), "warnings": ours}
    return found


def passed(found: dict[str, Any]) -> bool:
    return not found.get("untold") and all(found.get(pruner, {}).get("loads_equal") for pruner, _ in METHODS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all without any")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one)))
        return
    import transformers

    where = {"commit": commit(), "transformers": transformers.__version__}
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    results = known.get("architectures", {}) if {key: known.get(key) for key in where} == where else {}
    for name in options.names or architectures():
        if name in results:
            continue
        command = [sys.executable, __file__, "--one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            lines = (done.stdout.splitlines() or [""]) if not done.returncode else [""]
            failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
            results[name] = json.loads(lines[-1]) if lines[-1] else {"failed": failure}
        except subprocess.TimeoutExpired:
            results[name] = {"failed": f"took more than {SECONDS} s"}
        print(name, "passed" if passed(results[name]) else results[name], flush=True)
        built = {key: each for key, each in results.items() if "not_built" not in each}
        summary = {"built": len(built), "passed": sum(map(passed, built.values()))}
        FILE.write_text(json.dumps({**where, **summary, "architectures": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
