"""Tiny random models of many families, and the real ones that lie beside the project."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from msp.formats.patterns import NMPattern
from msp.models.structure import Linear, find_structure
from msp.ops import PackedWeight, nm_select
from msp.packed.checkpoint import replace_linears
from msp.plan.budget import Level, Unit

VOCABULARY = 96
# Token sets that a pipeline gets through in a moment.
SMALL = {"window": 16, "calibration_tokens": 64, "fitness_tokens": 64, "test_tokens": 64, "device": "cpu"}
CONTEXT = 64
MIXED = ("2:8", "1:4", "0:8", "8:8", "3:16", "5:32", "4:4", "7:8", "1:16")

LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def llama_like(config: str, **changes: Any) -> Callable[[], Any]:
    """Makes configs of a family whose options are Llama's."""
    return _config(config, **{**LLAMA_LIKE, **changes})


def _config(config: str, **options: Any) -> Callable[[], Any]:
    # The special ids that a family's defaults name lie outside this small vocabulary.
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return lambda: getattr(transformers, config)(vocab_size=VOCABULARY, **special, **options)


# Every input size is a multiple of 32, so that each group size fits; output sizes are not all.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama_like("LlamaConfig", num_key_value_heads=4, tie_word_embeddings=False),
    "llama-tied": llama_like("LlamaConfig", tie_word_embeddings=True, attention_bias=True),
    "mistral": llama_like("MistralConfig", num_key_value_heads=1, sliding_window=8),
    "qwen2": llama_like("Qwen2Config"),
    "qwen3": llama_like("Qwen3Config", head_dim=16, tie_word_embeddings=True),
    "gemma": llama_like("GemmaConfig", head_dim=16),
    "gemma2": llama_like("Gemma2Config", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "phi": llama_like("PhiConfig", num_key_value_heads=4, partial_rotary_factor=0.5),
    "opt": _config(
        "OPTConfig",
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    ),
    "gpt2": _config("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT),
    "gpt-neox": _config(
        "GPTNeoXConfig",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    ),
    "falcon": _config(
        "FalconConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bias=True,
        new_decoder_architecture=True,
    ),
    "mixtral": llama_like("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
}


# Models whose blocks have more to do with one another than hidden states.
UNUSUAL: dict[str, Callable[[], Any]] = {
    # blocks share the weights of one attention block, each with adapters and a mixer of its own
    "zamba2": _config(
        "Zamba2Config",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        layers_block_type=["linear_attention", "hybrid"] * 3,
        num_mem_blocks=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_d_state=8,
        max_position_embeddings=CONTEXT,
    ),
    # the last blocks read keys and values of earlier ones; each has an input of its own for every token
    "gemma4": _config(
        "Gemma4TextConfig",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        sliding_window=8,
        max_position_embeddings=CONTEXT,
    ),
    # a decoder whose cross-attention has nothing to attend to
    "bart": _config(
        "BartConfig",
        d_model=32,
        decoder_layers=2,
        encoder_layers=2,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_ffn_dim=64,
        encoder_ffn_dim=64,
        max_position_embeddings=CONTEXT,
        is_decoder=True,
    ),
    # two stacks that a forward runs in turns, again and again
    "hrm": llama_like("HrmTextConfig", num_hidden_layers=4, head_dim=8),
    # the first forward divides weights of the later blocks
    "rwkv": _config(
        "RwkvConfig",
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        rescale_every=2,
        context_length=CONTEXT,
    ),
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of ``family`` with random weights, biases and norms, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    config = {**FAMILIES, **UNUSUAL}[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    assert isinstance(model, PreTrainedModel)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words ``w0`` ... of the families' vocabulary."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", unk_token="w2")


def save(family: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write a dense model of ``family`` and its tokenizer to ``path``, and return the model."""
    model = build(family, seed, dtype)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model


def save_text(path: Path, seed: int) -> None:
    """Write 4096 random words that the tokenizer knows to ``path``."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCABULARY, (4096,), generator=generator).tolist()
    path.write_text(" ".join(f"w{word}" for word in words))


def tokens(batch: int, length: int, seed: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Random token ids ``[batch, length]``, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def shared(*parts: str) -> Path:
    """A file or folder of the shared models and data; skips the test where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("MSP_SHARED", beside)).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared models and data, looked for in ../shared and $MSP_SHARED")
    return path


def shared_model(name: str) -> Path:
    """The folder of a real model: ``char-gpt2``, ``stories260k`` or ``wiki6m``."""
    return shared("models", name)


def nm_unit(name: str, weights: int, group_size: int, block: int, kind: str, costs: Sequence[int] = ()) -> Unit:
    """A unit of one linear with the levels 0:M, 1:M ...; a level costs what it keeps, unless ``costs`` says more."""
    kept = costs or [weights // group_size * n for n in range(group_size + 1)]
    patterns = [NMPattern(n, group_size) for n in range(len(kept))]
    levels = [Level(cost, pattern.density, str(pattern)) for cost, pattern in zip(kept, patterns, strict=True)]
    return Unit(name, (name,), weights, block, kind, tuple(levels))


def nm_units(linears: Iterable[Linear], group_size: int = 8) -> list[Unit]:
    """A unit for every linear, with every pattern of groups of ``group_size``."""
    return [nm_unit(each.name, each.weight.numel(), group_size, each.block, each.kind) for each in linears]


def pack(model: PreTrainedModel, patterns: Sequence[str] = MIXED) -> dict[str, PackedWeight]:
    """Every prunable linear by magnitude, the patterns in turn, cut back to what each input size allows.

    The dense weights are masked in place too, so that the model computes what the packed one will.
    """
    packed = {}
    for linear, pattern in zip(find_structure(model).linears, itertools.cycle(map(NMPattern.parse, patterns))):
        columns = linear.shape[1]
        while columns % pattern.m:
            pattern = NMPattern(pattern.n // 2, pattern.m // 2)
        packed[linear.name] = nm_select(linear.weight.contiguous(), pattern)
        linear.weight.copy_(packed[linear.name].unpack())
    return packed


def packed_model(family: str, seed: int = 0, patterns: Sequence[str] = MIXED) -> PreTrainedModel:
    """A model of ``family`` with packed linears in place."""
    model = build(family, seed)
    replace_linears(model, pack(model, patterns))
    return model


def same_state(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    """Whether two models hold the same tensors under the same names, bit for bit."""
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
