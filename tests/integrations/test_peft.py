"""LoRA on packed linears: found, trained, saved, loaded and merged as peft does it, with the mask kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, pack, packed_model, same_state, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import msp  # noqa: F401
from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.ops import force_backend, nm_select
from msp.ops.linear import DENSE, ROWS, TILES, Layout
from msp.packed.checkpoint import save_packed
from msp.packed.info import read_info, validate_packed
from msp.packed.sparse_linear import SparseLinear

peft = pytest.importorskip("peft")
NAMES = ["q_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": NAMES, "task_type": "CAUSAL_LM", **options})


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Adapters as after training: B is zero in new ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (
                torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul(0.1).to(parameter.dtype)
            )


def adapted(family: str, **options: Any) -> tuple[PreTrainedModel, Any]:
    model = packed_model(family)
    wrapped = peft.get_peft_model(model, lora(**options))
    randomize(wrapped)
    return model, wrapped


def sparse_layers(wrapped: nn.Module) -> dict[str, Any]:
    """The adapted packed linears under their names in the model that was wrapped."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if isinstance(getattr(module, "base_layer", None), SparseLinear)
    }


def delta(layer: Any, adapter: str = "default") -> Tensor:
    product: Tensor = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
    return product.detach() * layer.scaling[adapter]


def reference(family: str, layers: dict[str, Any], merged: bool) -> PreTrainedModel:
    """In float64, the dense model with ``B A`` on every weight, or ``mask * B A``; the other adapters too."""
    model = build(family)
    packed = pack(model)
    model.double()
    with torch.no_grad():
        for name, layer in layers.items():
            linear = model.get_submodule(name)
            change = delta(layer)
            if merged and name in packed:
                change = change * packed[name].kept()
            linear.weight += change.t() if type(linear).__name__ == "Conv1D" else change
    return model


def every_layer(wrapped: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if hasattr(module, "base_layer")
    }


def logits(model: Any, seed: int = 0) -> Tensor:
    with torch.no_grad():
        found = model(tokens(2, 9, seed)).logits
    assert isinstance(found, Tensor)
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


CASES = [("llama", NAMES), ("llama-tied", "all-linear"), ("gpt2", ["c_attn", "c_fc"]), ("gpt2", "all-linear")]


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_adapters_compute_what_a_dense_model_says(family: str, targets: Any) -> None:
    _, wrapped = adapted(family, target_modules=targets)
    layers, packed = every_layer(wrapped), sparse_layers(wrapped)
    assert packed.keys() <= layers.keys() and len(packed) > 2
    before = {name: layer.base_layer.packed for name, layer in packed.items()}
    unmerged = logits(wrapped)
    close(unmerged, logits(reference(family, layers, merged=False)))

    wrapped.merge_adapter()
    under_mask = logits(wrapped)
    close(under_mask, logits(reference(family, layers, merged=True)))
    assert not torch.allclose(under_mask, unmerged)  # the part of the adapter off the mask is gone
    for name, layer in packed.items():
        after = layer.base_layer.packed
        after.check(name)
        assert torch.equal(after.bitmask, before[name].bitmask) and after.values.dtype == before[name].values.dtype
        expected = before[name].unpack() + delta(layer) * before[name].kept()
        torch.testing.assert_close(after.unpack().double(), expected, rtol=1e-5, atol=1e-6)
        assert not after.unpack()[~before[name].kept()].any()

    wrapped.unmerge_adapter()
    for name, layer in packed.items():
        assert torch.equal(layer.base_layer.packed.values, before[name].values)
    close(logits(wrapped), logits(reference(family, layers, merged=False)))
    with wrapped.disable_adapter():
        close(logits(wrapped), logits(packed_model(family)))


def test_all_linear_finds_every_linear_but_the_head() -> None:
    for family in ("llama", "gpt2", "mixtral"):
        model = packed_model(family)
        names = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
        dense = build(family)
        wrapped, expected = (peft.get_peft_model(each, lora(target_modules="all-linear")) for each in (model, dense))
        assert every_layer(wrapped).keys() == every_layer(expected).keys() >= names
        # a second adapter finds them too, and puts none on adapters
        wrapped.add_adapter("second", lora(target_modules="all-linear"))
        assert every_layer(wrapped).keys() == every_layer(expected).keys()
        for layer in sparse_layers(wrapped).values():
            assert set(layer.lora_A) == {"default", "second"}


def test_names_pick_only_what_they_name() -> None:
    _, wrapped = adapted("llama", target_modules=["up_proj"])
    assert {name.rpartition(".")[2] for name in every_layer(wrapped)} == {"up_proj"}
    # those that peft knows for the architecture
    _, wrapped = adapted("llama", target_modules=None)
    assert {name.rpartition(".")[2] for name in every_layer(wrapped)} == {"q_proj", "v_proj"}


def test_no_layer_is_called_unsupported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted("llama", target_modules=NAMES)


def test_training_changes_only_the_adapters() -> None:
    model = packed_model("llama")
    before = copy.deepcopy(model.state_dict())
    wrapped = peft.get_peft_model(model, lora())
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    ids, losses = tokens(4, 12, 0), []
    for _ in range(12):
        loss = wrapped(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_gradients_are_those_of_the_dense_model() -> None:
    _, wrapped = adapted("llama")
    dense = build("llama")
    pack(dense)
    expected = peft.get_peft_model(dense, lora())
    randomize(expected)
    ids = tokens(2, 9, 0)
    for model in (wrapped, expected):
        model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    others = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-5)


FRESH = """
import sys
{first}
{second}
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
base, adapter = sys.argv[1:]
ids = torch.tensor([[5, 6, 7, 8]])
for model in (
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    AutoPeftModelForCausalLM.from_pretrained(adapter),
    AutoModelForCausalLM.from_pretrained(adapter),
):
    print(model(ids).logits.double().sum().item())
"""


def test_an_adapter_is_saved_loaded_and_merged_for_good(tmp_path: Path) -> None:
    base = save_packed(packed_model("llama"), None, tmp_path / "base", recipe={})
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, lora(target_modules="all-linear"))
    randomize(wrapped)
    with torch.no_grad():
        expected = wrapped(torch.tensor([[5, 6, 7, 8]])).logits.double().sum().item()
    wrapped.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HUB_OFFLINE": "1"}
    orders = [("import msp", "import peft"), ("import peft", "import msp")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FRESH.format(first=first, second=second), base, tmp_path / "adapter"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first, second in orders
    ]
    for process in running:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        assert [float(line) for line in output.splitlines()] == pytest.approx([expected] * 3, rel=1e-5)

    layers = every_layer(wrapped)
    merged = wrapped.merge_and_unload()
    assert merged is model and not every_layer(merged)
    merged.save_pretrained(tmp_path / "merged")
    validate_packed(tmp_path / "merged")
    one, other = read_info(tmp_path / "merged").manifest, read_info(base).manifest
    assert one.hashes.keys() == other.hashes.keys() and one.hashes != other.hashes
    assert replace(one, hashes={}) == replace(other, hashes={})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_state(loaded, merged)
    close(logits(loaded), logits(reference("llama", layers, merged=True)))


def test_several_adapters_merge_into_one_and_come_out_again() -> None:
    _, wrapped = adapted("llama", target_modules=["up_proj"])
    wrapped.add_adapter("second", lora(target_modules=["up_proj"], r=2))
    randomize(wrapped, seed=1)
    layers = sparse_layers(wrapped)
    before = {name: layer.base_layer.packed for name, layer in layers.items()}
    wrapped.merge_adapter(["default"])
    wrapped.merge_adapter(["second"])
    for name, layer in layers.items():
        change = (delta(layer) + delta(layer, "second")) * before[name].kept()
        found = layer.base_layer.weight.double()
        torch.testing.assert_close(found, before[name].unpack() + change, rtol=1e-5, atol=1e-6)
    wrapped.unmerge_adapter()
    for name, layer in layers.items():
        assert torch.equal(layer.base_layer.packed.values, before[name].values)
        assert layer.unmerged_values is None and not layer.merged_adapters


def test_half_precision_is_rounded_once_and_restored_exactly() -> None:
    model = packed_model("llama").to(torch.bfloat16)
    wrapped = peft.get_peft_model(model, lora())
    randomize(wrapped)
    layers = sparse_layers(wrapped)
    before = {name: layer.base_layer.packed for name, layer in layers.items()}
    wrapped.merge_adapter(safe_merge=True)
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        change = (layer.get_delta_weight("default").detach())[before[name].kept()].view(before[name].values.shape)
        assert torch.equal(layer.base_layer.values, (before[name].values.float() + change).to(torch.bfloat16))
    wrapped.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.values, before[name].values) for name, layer in layers.items())


@pytest.mark.parametrize("layout", [TILES, DENSE])
def test_layouts_of_a_gpu_are_brought_to_rows(layout: Layout) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    linear = SparseLinear.from_packed(nm_select(weight, NMPattern(2, 8)))
    before = linear.packed
    linear._set_layout(layout)
    assert linear.layout == layout and not torch.equal(linear.values.flatten()[:64], before.values.flatten()[:64])
    layer = peft.get_peft_model(nn.ModuleDict({"up": linear}), peft.LoraConfig(r=4, target_modules=["up"]))
    randomize(layer)
    (adapted_layer,) = sparse_layers(layer).values()
    layer.merge_adapter()
    change = adapted_layer.get_delta_weight("default").detach()[before.kept()].view(before.values.shape)
    assert linear.layout == ROWS  # the best that a CPU has
    assert torch.equal(linear.values, (before.values.float() + change).to(torch.bfloat16))
    linear._set_layout(layout)
    layer.unmerge_adapter()
    assert torch.equal(linear.packed.values, before.values) and torch.equal(linear.packed.bitmask, before.bitmask)


def test_biases_of_adapters() -> None:
    _, wrapped = adapted("llama-tied", target_modules=["q_proj"], lora_bias=True)
    layers = sparse_layers(wrapped)
    before = {name: layer.base_layer.bias.detach().clone() for name, layer in layers.items()}
    assert layers
    wrapped.merge_adapter()
    for name, layer in layers.items():
        change = layer.lora_B["default"].bias * layer.scaling["default"]
        assert torch.equal(layer.base_layer.bias, before[name] + change) and change.any()
    wrapped.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.bias, before[name]) for name, layer in layers.items())


def test_a_merge_that_is_not_finite_changes_nothing() -> None:
    _, wrapped = adapted("llama", target_modules=["up_proj"])
    layer = next(iter(sparse_layers(wrapped).values()))
    layer.lora_B["default"].weight.data[:] = float("inf")
    before = layer.base_layer.values
    with pytest.raises(ValueError, match="not finite"):
        wrapped.merge_adapter(safe_merge=True)
    assert layer.base_layer.values is before and not layer.merged_adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "plain LoRA.*use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights is 'eva'"),
    ],
)
def test_what_would_write_to_the_dense_weight_is_refused(options: dict[str, Any], message: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=NAMES, **options)
    with pytest.raises(MspError, match=message):
        peft.get_peft_model(packed_model("llama"), config)


def test_offloaded_linears_take_no_adapter(tmp_path: Path) -> None:
    base = save_packed(packed_model("llama"), None, tmp_path / "base", recipe={})
    model = AutoModelForCausalLM.from_pretrained(base, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    with pytest.raises(MspError, match=r"model\.layers\.0\.self_attn\.q_proj: its weights are offloaded"):
        peft.get_peft_model(model, lora())


def test_transformers_own_adapters(tmp_path: Path) -> None:
    base = save_packed(packed_model("llama"), None, tmp_path / "base", recipe={})
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(model)
    model.add_adapter(lora())
    randomize(model)
    expected = logits(model)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(MspError, match="merge_and_unload or unload first"):
        loaded.dequantize()


def test_dense_layers_are_as_without_msp() -> None:
    model = build("llama")
    wrapped = peft.get_peft_model(model, lora(use_dora=True))
    assert {type(layer) for layer in every_layer(wrapped).values()} == {peft.tuners.lora.Linear}
    assert not sparse_layers(wrapped)


def test_set_values_refuses_what_does_not_fit() -> None:
    linear = packed_model("llama").model.layers[0].self_attn.q_proj
    values = linear.values
    for wrong, message in (
        (values[:, 1:], "shape"),
        (values.double(), "dtype"),
        (values.to("meta"), "device"),
    ):
        with pytest.raises(MspError, match=message):
            linear.set_values(wrong)
    assert linear.values is values
    linear.set_values(values * 2)
    assert torch.equal(linear.values, values * 2) and not linear.values.requires_grad
    with force_backend("reference"):
        assert linear(torch.ones(1, 32)).shape == (1, 32)
