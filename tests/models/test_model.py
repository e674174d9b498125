"""The structural view of a model, over families and over what is no model at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, packed_model, save, shared_model, tokenizer, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from msp.errors import MspError, UsageError
from msp.models.loading import load_model, read_causal_config
from msp.models.structure import check_finite, find_structure
from msp.packed.checkpoint import save_packed

LLAMA = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
GPT_NEOX = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
OPT_ATTENTION = {"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"}
PHI_ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"}

EXPECTED: dict[str, tuple[str, set[str]]] = {
    "llama": ("model.layers", LLAMA),
    "llama-tied": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "gemma": ("model.layers", LLAMA),
    "gemma2": ("model.layers", LLAMA),
    "phi": ("model.layers", PHI_ATTENTION | {"mlp.fc1", "mlp.fc2"}),
    "opt": ("model.decoder.layers", OPT_ATTENTION | {"fc1", "fc2"}),
    "gpt2": ("transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "gpt-neox": ("gpt_neox.layers", GPT_NEOX),
    "falcon": (
        "transformer.h",
        {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "mixtral": ("model.layers", {kind for kind in LLAMA if kind.startswith("self_attn")}),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_block_and_linear(family: str) -> None:
    model = build(family)
    structure = find_structure(model)
    prefix, kinds = EXPECTED[family]
    assert [block.name for block in structure.blocks] == [f"{prefix}.0", f"{prefix}.1"]
    for index, block in enumerate(structure.blocks):
        assert block.index == index and block.module is model.get_submodule(block.name)
        assert {linear.kind for linear in block.linears} == kinds
        for linear in block.linears:
            assert linear.name == f"{block.name}.{linear.kind}" and linear.block == index
            assert model.get_submodule(linear.name) is linear.module
    assert structure.linears == structure.blocks[0].linears + structure.blocks[1].linears


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_is_what_its_module_computes(family: str) -> None:
    for linear in find_structure(build(family)).linears:
        rows, columns = linear.shape
        x = torch.randn(3, columns)
        with torch.no_grad():
            expected = nn.functional.linear(x, linear.weight, linear.bias)
            torch.testing.assert_close(linear.module(x), expected)
        assert expected.shape == (3, rows)
        assert linear.transposed == isinstance(linear.module, Conv1D) == (family == "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_shares_memory_with_its_module(family: str) -> None:
    model, ids = build(family), tokens(1, 8, 0)
    structure = find_structure(model)
    with torch.no_grad():
        before = model(ids).logits
        for linear in structure.linears:
            linear.weight.zero_()
        assert not torch.equal(model(ids).logits, before)
    assert not any(parameter.any() for linear in structure.linears for parameter in [linear.module.weight])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_a_linear_or_reported(family: str) -> None:
    model = build(family)
    structure = find_structure(model)
    inside = tuple(f"{block.name}." for block in structure.blocks)
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1 and n.startswith(inside)}
    linears = {f"{linear.name}.weight" for linear in structure.linears}
    assert linears | set(structure.not_linear) == matrices and not linears & set(structure.not_linear)
    outside = {n for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith(inside)}
    assert outside and not outside & linears


def test_experts_are_reported_with_their_shape() -> None:
    reasons = find_structure(build("mixtral")).not_linear
    assert len(reasons) == 6
    assert reasons["model.layers.1.mlp.experts.down_proj"] == "a [4, 32, 64] parameter of MixtralExperts, not a linear"


def test_shared_layers_count_once() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    names = [linear.name for linear in find_structure(model).linears]
    assert len(names) == 13 and "model.layers.1.mlp.up_proj" not in names


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(MspError, match="Sequential has no list of transformer blocks"):
        find_structure(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("value, count", [(float("nan"), 1), (float("inf"), 3)])
def test_weights_that_are_not_finite_are_named_and_counted(value: float, count: int) -> None:
    linears = find_structure(build("gpt2")).linears
    check_finite(linears)
    linears[5].weight[1, :count] = value
    with pytest.raises(MspError, match=rf"{linears[5].name}: {count} of its {linears[5].weight.numel()} values"):
        check_finite(linears)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_loads_a_directory(family: str, tmp_path: Path) -> None:
    saved = save(family, tmp_path, dtype=torch.bfloat16)
    for dtype, expected in (("auto", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        loaded = load_model(tmp_path, dtype=dtype)
        assert loaded.model.dtype == expected and loaded.stored_dtype == torch.bfloat16
        assert not loaded.model.training and loaded.source == str(tmp_path)
        weight = loaded.model.get_input_embeddings().weight
        assert torch.equal(weight, saved.get_input_embeddings().weight.to(expected))
    assert loaded.tokenizer("w7 w8").input_ids == [7, 8]


def test_loads_a_packed_model_in_its_own_dtype(tmp_path: Path) -> None:
    model = packed_model("llama")
    save_packed(model.to(torch.bfloat16), tokenizer(), tmp_path / "out", recipe={})
    loaded = load_model(tmp_path / "out")
    assert loaded.model.dtype == loaded.stored_dtype == torch.bfloat16
    assert load_model(tmp_path / "out", dtype="float32").model.dtype == torch.float32


def test_a_tokenizer_is_not_required(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer is None


def test_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(MspError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MspError, match=r"config\.json: cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(MspError, match="no-such-type"):
        load_model(tmp_path)


def test_refuses_models_that_are_not_causal(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "bert")
    t5 = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(MspError, match="t5 model, which is not a causal language model"):
        load_model(tmp_path / "t5")
    with pytest.raises(MspError, match="bert model, which is not a causal language model"):
        load_model(tmp_path / "bert")
    BertForMaskedLM(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "masked")  # has every weight
    with pytest.raises(MspError, match="bert model, which is not a causal language model"):
        load_model(tmp_path / "masked")
    BertLMHeadModel(BertConfig(vocab_size=16, is_decoder=True, **sizes)).save_pretrained(tmp_path / "decoder")
    assert load_model(tmp_path / "decoder").model.config.is_decoder


def test_refuses_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"float8.*auto, float32"):
        load_model(tmp_path, dtype="float8")


@pytest.mark.parametrize("wrong", [[5], 5, {"a": 1}])
def test_architectures_that_are_no_texts_are_refused(wrong: object, tmp_path: Path) -> None:
    save("llama", tmp_path / "llama")
    content = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(content | {"architectures": wrong}))
    with pytest.raises(MspError, match="architectures"):
        read_causal_config(tmp_path / "llama")


def test_refuses_a_model_without_weights_or_with_pickled_ones(tmp_path: Path) -> None:
    model = save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MspError, match="cannot load the weights"):
        load_model(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(MspError, match="safetensors"):
        load_model(tmp_path)


def test_refuses_missing_and_misshapen_weights(tmp_path: Path) -> None:
    save("llama", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in whole.items() if n != name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MspError, match=f"missing.*{name}"):
        load_model(tmp_path)
    save_file({**whole, name: whole[name][:-1].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MspError, match="cannot load the weights"):
        load_model(tmp_path)


def test_refuses_a_truncated_file(tmp_path: Path) -> None:
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MspError, match="cannot load the weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("name, linears", [("char-gpt2", 16), ("stories260k", 35), ("wiki6m", 84)])
def test_real_models(name: str, linears: int) -> None:
    loaded = load_model(shared_model(name))
    structure = find_structure(loaded.model)
    check_finite(structure.linears)
    assert len(structure.linears) == linears and loaded.tokenizer is not None
    assert isinstance(loaded.model, type(AutoModelForCausalLM.from_config(loaded.model.config)))
