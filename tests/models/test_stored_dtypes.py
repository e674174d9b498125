"""Every tensor keeps the dtype that its file has, and what is no plain float weight is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONTEXT, SMALL, VOCABULARY, build, save, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
from typer.testing import CliRunner

import msp
from msp import evaluate, measure, search, sensitivity
from msp.base.safetensors_files import read_headers, tensor_files
from msp.cli import app
from msp.errors import MspError, UsageError
from msp.models.as_loaded import StoredDtypes
from msp.models.loading import load_model
from msp.models.stored import load_stored
from msp.models.structure import find_structure
from msp.packed.info import read_info
from msp.text.token_sets import save_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_tokens(tokens(1, 4000, seed=1)[0], path)
    return {"sparsity": 0.5, "allocator": "uniform", "calibration": str(path), **SMALL}


def stored_as(folder: Path, dtype_of: Callable[[str], torch.dtype], config_dtype: str | None = "float32") -> None:
    """Write the tensors of the model in ``folder`` in other dtypes, and another dtype, or none, in its config.json."""
    file = folder / "model.safetensors"
    save_file(
        {name: tensor.to(dtype_of(name)) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config_dtype
    (folder / "config.json").write_text(json.dumps(config))


def mixed(name: str) -> torch.dtype:
    """Norms in float32, a projection in float16, the rest in bfloat16."""
    if "norm" in name or "ln_" in name:
        return torch.float32
    return torch.float16 if "down_proj.weight" in name or "mlp.c_proj.weight" in name else torch.bfloat16


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("named", [None, "float32"])
@pytest.mark.parametrize("streamed", [False, True])
def test_config_json_does_not_say_what_weights_are_stored_in(
    named: str | None, streamed: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    stored_as(tmp_path / "dense", lambda _: torch.bfloat16, named)
    result = msp.prune(tmp_path / "dense", output=tmp_path / "out", stream=streamed, **options)
    assert {header.dtype for header in read_headers(tensor_files(tmp_path / "out")).values()} == {"BF16", "U8"}
    assert result.bytes == {"dense": tensor_bytes(tmp_path / "dense"), "packed": tensor_bytes(tmp_path / "out")}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_a_mixed_checkpoint_stays_mixed(family: str, streamed: bool, options: dict[str, Any], tmp_path: Path) -> None:
    save(family, tmp_path / "dense")
    stored_as(tmp_path / "dense", mixed)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    result = msp.prune(tmp_path / "dense", output=tmp_path / "out", stream=streamed, **options)
    loaded = load_model(tmp_path / "dense")
    prefix = f"{loaded.model.base_model_prefix}."
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= {name: tensor for name, tensor in load_file(file).items() if tensor.numel()}  # guards are empty
    compared = 0
    for name, tensor in found.items():
        own = name if name in dense or name.endswith((".values", ".bitmask")) else name.removeprefix(prefix)
        own = own.removesuffix("values") + "weight" if own.endswith(".values") else own
        own = own if own in dense else own.removeprefix(prefix)
        if not name.endswith(".bitmask"):
            assert tensor.dtype == dense[own].dtype, name
            compared += 1
        if own == name:
            assert torch.equal(tensor, dense[own]), name
    assert compared == len(dense)
    assert result.bytes == {"dense": tensor_bytes(tmp_path / "dense"), "packed": tensor_bytes(tmp_path / "out")}
    info = read_info(tmp_path / "out")
    assert {linear.dtype for linear in info.linears} == {"BF16", "F16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"

    # In float32 the packed model is the one that was measured; plain transformers casts all to bfloat16.
    text = {"evaluate": options["calibration"], "window": 16, "test_tokens": 64, "device": "cpu"}
    exact = evaluate(tmp_path / "out", reference=tmp_path / "dense", dtype="float32", **text)
    assert exact.kl == pytest.approx(result.kl, rel=1e-4)
    assert exact.perplexity == pytest.approx(result.perplexity["pruned"], rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    cast = evaluate(tmp_path / "out", **text)
    assert cast.perplexity == pytest.approx(result.perplexity["pruned"], rel=0.03)


def test_fused_experts_and_tied_weights_have_the_dtypes_of_what_they_are_made_of(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "experts")
    stored_as(tmp_path / "experts", lambda name: torch.float32 if "experts.1.w2" in name else torch.bfloat16)
    stored = load_model(tmp_path / "experts").stored
    assert stored.of("model.layers.0.mlp.experts.down_proj") == torch.float32, "the wider of the two"
    assert stored.of("model.layers.0.mlp.experts.gate_up_proj") == torch.bfloat16
    assert stored.dense_bytes == tensor_bytes(tmp_path / "experts")
    save("llama-tied", tmp_path / "tied")
    stored_as(tmp_path / "tied", lambda name: torch.float32 if "embed" in name else torch.bfloat16)
    stored = load_model(tmp_path / "tied").stored
    assert stored.of("lm_head.weight") == stored.of("model.embed_tokens.weight") == torch.float32
    assert stored.common == torch.bfloat16


def test_budgets_in_bytes_count_what_is_stored(options: dict[str, Any], tmp_path: Path) -> None:
    save("llama", tmp_path / "dense")
    stored_as(tmp_path / "dense", mixed)
    budget = tensor_bytes(tmp_path / "dense") * 3 // 4
    asked = {**options, "sparsity": None, "budget_bytes": budget}
    result = msp.prune(tmp_path / "dense", output=tmp_path / "out", **asked)
    assert tensor_bytes(tmp_path / "out") == result.spent == result.bytes["packed"] <= budget
    assert result.spent > 0.95 * budget
    assert search(tmp_path / "dense", **asked).bytes == result.bytes


def test_a_model_object_is_stored_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama")
    model.model.norm.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    stored = StoredDtypes.of_model(model)
    assert stored.common == torch.float32 and stored.of("lm_head.weight") == torch.bfloat16
    model.lm_head.float()
    result = msp.prune(model, output=tmp_path / "out", **options)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert result.bytes["packed"] == tensor_bytes(tmp_path / "out")


def test_decode_tables_and_info_read_the_dtype_of_the_files(tmp_path: Path) -> None:
    save("llama", tmp_path / "dense")
    stored_as(tmp_path / "dense", mixed)
    assert measure(tmp_path / "dense", patterns="2:8").dtype == "bfloat16"
    told = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "dense"), "--json"]).stdout)
    assert told["dtype"] == "bfloat16" and told["bytes"] == tensor_bytes(tmp_path / "dense")


def add(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def both_ways(folder: Path) -> list[Callable[[], Any]]:
    return [lambda: load_model(folder), lambda: load_stored(folder, device=CPU)]


def test_tensors_that_the_model_does_not_take_are_an_error(tmp_path: Path) -> None:
    save("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    add(tmp_path, **{name: torch.ones(64, 1), "model.layers.1.mlp.up_proj.weight_scale": torch.ones(64, 1)})
    for load in both_ways(tmp_path):
        with pytest.raises(MspError, match=rf"{name} and 1 more tensors of the checkpoint have no place"):
            load()


@pytest.mark.parametrize(
    "family, left",
    [
        ("gpt2", {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()}),
        ("gpt-neox", {"gpt_neox.layers.1.attention.bias": (1, 1, 64, 64)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "model.embed_tokens.position_ids": (1, 64)}),
    ],
)
def test_tables_of_earlier_versions_are_none(family: str, left: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    model = save(family, tmp_path)
    expected = model(tokens(1, 8, seed=3)).logits
    add(tmp_path, **{name: torch.ones(shape) for name, shape in left.items()})
    for load in both_ways(tmp_path):
        load()
    assert torch.equal(load_model(tmp_path).model(tokens(1, 8, seed=3)).logits, expected)


def test_a_bias_that_has_no_place_is_no_mask(tmp_path: Path) -> None:
    save("llama", tmp_path)
    add(tmp_path, **{"model.layers.0.attention.bias": torch.ones(32)})
    for load in both_ways(tmp_path):
        with pytest.raises(MspError, match=r"model\.layers\.0\.attention\.bias of the checkpoint has no place"):
            load()


def test_missing_and_misshapen_weights_are_named_the_same_streamed(tmp_path: Path) -> None:
    save("llama", tmp_path)
    whole, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    save_file({**whole, name: whole[name][:-1].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = []
    for load in both_ways(tmp_path):
        with pytest.raises(MspError, match=rf"{name} is stored in the shape \[63, 32\].* needs \[64, 32\]") as error:
            load()
        told.append(str(error.value))
    assert told[0] == told[1]
    del whole[name]
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in both_ways(tmp_path):
        with pytest.raises(MspError, match=f"missing and would be random: {name}"):
            load()


def fp8(folder: Path, block: int = 32) -> LlamaForCausalLM:
    """A block-quantised checkpoint as transformers' FineGrainedFP8Config reads it, and the model it stands for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, dtype="bfloat16", **sizes)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for linear in find_structure(model).linears:
        blocks = linear.weight.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))
        scale = blocks.abs().amax((1, 3)) / 448
        quantised = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        name = f"{linear.name}.weight"
        tensors |= {name: quantised.flatten(2, 3).flatten(0, 1), f"{name}_scale_inv": scale}
        linear.weight.copy_((quantised.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_fp8_is_refused_and_dequantised_if_asked(options: dict[str, Any], tmp_path: Path) -> None:
    model = fp8(tmp_path / "fp8")
    refused = [*both_ways(tmp_path / "fp8"), lambda: measure(tmp_path / "fp8", patterns="2:8")]
    refused += [
        lambda: msp.prune(tmp_path / "fp8", **options),
        lambda: search(tmp_path / "fp8", stream=True, **options),
    ]
    refused += [lambda: evaluate(tmp_path / "fp8", evaluate=options["calibration"])]
    for load in refused:
        with pytest.raises(MspError, match=r"quantised \(fp8\).* --dequantise") as error:
            load()
        assert "\n" not in str(error.value)
    loaded = load_model(tmp_path / "fp8", dequantise=True)
    weight = find_structure(loaded.model).linears[3].weight
    assert weight.dtype == torch.float32 and loaded.stored_dtype == torch.bfloat16
    assert torch.equal(weight.to(torch.bfloat16), find_structure(model).linears[3].weight)
    assert loaded.stored.dense_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    result = msp.prune(tmp_path / "fp8", output=tmp_path / "out", dequantise=True, **options)
    assert math.isfinite(result.kl) and result.bytes["packed"] == tensor_bytes(tmp_path / "out")
    assert load_model(tmp_path / "out").model.dtype == torch.bfloat16
    told = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "fp8"), "--json"]).stdout)
    assert told["quantised"] == "fp8" and told["dtype"] == "bfloat16"
    with pytest.raises(UsageError, match="dequantise does not go with stream"):
        msp.prune(tmp_path / "fp8", output=tmp_path / "out", dequantise=True, stream=True, force=True, **options)


def test_what_a_library_says_of_a_tensor_is_told(tmp_path: Path) -> None:
    fp8(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    add(tmp_path, **{f"{name}_scale_inv": torch.ones(3, 2)})
    with pytest.raises(MspError, match=rf"cannot be dequantised here: {name}: .*(not divisible|is invalid)"):
        load_model(tmp_path, dequantise=True)


def test_fp8_without_its_configuration_is_refused(tmp_path: Path) -> None:
    fp8(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in [*both_ways(tmp_path), lambda: load_model(tmp_path, dequantise=True)]:
        with pytest.raises(MspError, match=r"down_proj\.weight is stored in F8_E4M3, as a quantised weight"):
            load()


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "no-such-method"])
def test_what_cannot_be_dequantised_here_is_an_error_with_its_reason(method: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in both_ways(tmp_path):
        with pytest.raises(MspError, match=rf"is quantised \({method}\).* --dequantise"):
            load()
    with pytest.raises(MspError, match=rf"quantised \({method}\) and cannot be dequantised here: \w+"):
        load_model(tmp_path, dequantise=True)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    add(tmp_path, **{name: torch.ones(64, 32, dtype=torch.int8)})
    for load in both_ways(tmp_path):
        with pytest.raises(MspError, match=rf"{name} is stored in I8, as a quantised weight"):
            load()


def test_float64_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    save("llama", tmp_path)
    stored_as(tmp_path, lambda name: torch.float64 if "norm" in name else torch.float32)
    for streamed in (False, True):
        with pytest.raises(MspError, match=r"norm\.weight is float64, and weights can be float32, float16, bfloat16"):
            search(tmp_path, stream=streamed, **options)
    for verb in (msp.prune, search):
        with pytest.raises(MspError, match=r"embed_tokens\.weight is float64"):
            verb(build("llama").double(), **options)


def _masked(model: nn.Module) -> None:
    prune.l1_unstructured(model.get_submodule("model.layers.0.mlp.up_proj"), "weight", 0.5)


def _parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model.get_submodule("model.layers.0.mlp.up_proj"))


def _weight_norm(model: nn.Module) -> None:
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    weight = module.weight.detach()
    del module._parameters["weight"]
    module.weight = weight


def _adapted(model: nn.Module) -> None:
    adapter = type("LoraLinear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})
    model.get_submodule("model.layers.0.mlp").add_module("up_proj", adapter())


def _offloaded(model: nn.Module) -> None:
    model.get_submodule("model.layers.0.mlp.up_proj").to("meta")


@pytest.mark.parametrize(
    "change, message",
    [
        (_masked, r"mlp\.up_proj has a mask of torch\.nn\.utils\.prune: make it permanent"),
        (_parametrized, r"mlp\.up_proj has parametrizations: make them permanent"),
        (_weight_norm, r"the weight of model\.layers\.0\.mlp\.up_proj is computed from other tensors"),
        (_adapted, r"has adapters .*mlp\.up_proj is a LoraLinear of peft.* merge_and_unload"),
        (_offloaded, r"up_proj\.weight is not in memory"),
    ],
)
def test_models_whose_weights_are_no_plain_tensors_are_refused(
    change: Callable[[nn.Module], None], message: str, options: dict[str, Any]
) -> None:
    model = build("llama")
    change(model)
    for verb in (msp.prune, search):
        with pytest.raises(MspError, match=message):
            verb(model, **options)
    with pytest.raises(MspError, match=message):
        sensitivity(model, calibration=options["calibration"], window=16, calibration_tokens=64, device="cpu")


@pytest.mark.parametrize("streamed", [False, True])
def test_layers_that_transformers_leaves_out_are_no_error_and_no_dense_bytes(streamed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        head_dim=8,
        num_key_value_heads=2,
        layer_types=["full_attention"] * 2,
        num_experts=0,
        **sizes,
    )
    Qwen3NextForCausalLM(config).save_pretrained(tmp_path)
    size = tensor_bytes(tmp_path)
    add(tmp_path, **{"mtp.layers.0.mlp.up_proj.weight": torch.ones(64, 32)})
    loaded = load_stored(tmp_path, device=CPU)[0] if streamed else load_model(tmp_path)
    assert loaded.stored.dense_bytes == size
