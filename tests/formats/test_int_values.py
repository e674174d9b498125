"""A second way to write values, from the format to a loaded model: ``int8/64`` beside N:M."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, llama_like, same_state, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import msp
from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.formats.storage import VALUE_DTYPES, Storage
from msp.models.loading import load_model
from msp.models.structure import find_structure
from msp.ops import CodedWeight, force_backend, last_backend, nm_linear, nm_select, quantise_values
from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.coded_linear import CodedLinear
from msp.packed.dense import export_dense
from msp.packed.info import read_info, validate_packed
from msp.packed.model_card import model_card
from msp.packed.sparse_linear import SparseLinear, shared_by, storages_of


def coded(
    pattern: str = "2:8", rows: int = 6, columns: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[CodedWeight, Tensor]:
    """A coded weight, and the pruned weight that it was made of."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = nm_select(weight, NMPattern.parse(pattern))
    return quantise_values(packed, "int8/64"), packed.unpack()


@pytest.mark.parametrize("text", ["int8/64", "int4/32", "2:8+int4/64", "8:8+int8/128", "1:4+int2/32", "3:32+int3/64"])
def test_what_is_written_is_read(text: str) -> None:
    storage = Storage.parse(text)
    assert str(storage) == text == storage.label and storage.is_coded and not storage.is_dense


@pytest.mark.parametrize(
    "text", ["int5/64", "int8/48", "int8", "2:8+int8/", "2:8int8/64", "int8/64+2:8", "x:8+int8/64"]
)
def test_what_is_no_way_to_write_values_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Storage.parse(text)


def test_bits_a_weight() -> None:
    bits = {
        **{"2:8+int4/64": 2.25, "4:8+int4/64": 3.25, "4:8+int2/64": 2.25, "int4/64": 4.25, "int2/64": 2.25},
        **{"2:8+int8/64": 3.25, "int8/64": 8.25, "8:8+int8/64": 8.25, "int3/64": 3.25, "4:8+int3/64": 2.75},
    }
    for dtype in VALUE_DTYPES:
        assert {name: Storage.parse(name).bits_per_weight(3, 256, dtype) for name in bits} == bits


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(["0:8", "1:4", "2:8", "8:8", "5:16", "31:32", "4:4"]),
    rows=st.integers(0, 4),
    groups=st.integers(0, 3),
    dtype=st.sampled_from(VALUE_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_parts_are_those_of_the_table_and_values_are_near(
    pattern: str, rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    """No value is off by more than half a step, but for the rounding of the scale to fp16."""
    packed, pruned = coded(pattern, rows, 64 * groups, dtype, seed)
    packed.check("w")
    table = packed.storage.parts(rows, 64 * groups)
    assert {name: (tuple(part.shape), part.dtype) for name, part in packed.parts.items()} == table
    assert packed.nbytes == packed.storage.nbytes(rows, 64 * groups, dtype)
    assert ("bitmask" in table) == (not NMPattern.parse(pattern).is_dense)
    found = packed.unpack()
    steps = packed.parts["scales"].float().repeat_interleave(64, 1)
    assert (found - pruned.float()).abs().le(steps * 0.57).all()
    assert torch.equal(packed.kept(), nm_select(pruned, packed.pattern, scores=(pruned != 0).float()).kept())
    # what is on the grid stays where it is
    again = quantise_values(nm_select(found, packed.pattern, scores=packed.kept().float()), "int8/64")
    assert all(torch.equal(part, again.parts[name]) for name, part in packed.parts.items())


def test_codes_and_scales_by_hand() -> None:
    weight = torch.zeros(1, 128)
    weight[0, [0, 1, 8, 9]] = torch.tensor([12.7, -0.06, 6.37, 0.04])  # in the first group; the second is all zero
    packed = quantise_values(nm_select(weight, NMPattern(2, 8)), "int8/64")
    assert packed.parts["scales"].tolist() == [[float(np.float16(0.1)), 0.0]]
    assert packed.parts["codes"][0, :4].tolist() == [127, -1, 64, 0] and not packed.parts["codes"][0, 4:].any()


def test_weights_that_cannot_be_written_say_why() -> None:
    with pytest.raises(MspError, match="96 columns are not a multiple of the 64 that share a scale"):
        coded(columns=96)
    packed = nm_select(torch.full((1, 64), 1e7), NMPattern(2, 8))
    with pytest.raises(MspError, match=r"weights up to 1e\+07 have no int8/64 scale"):
        quantise_values(packed, "int8/64")
    with pytest.raises(UsageError, match="int4/64 values are not built"):
        quantise_values(packed, "int4/64")
    for values in ("2:8", "dense", "removed", "2:8+int8/64"):
        with pytest.raises(UsageError, match="is no way to write values"):
            quantise_values(packed, values)


def test_damaged_parts_are_named() -> None:
    packed, _ = coded()
    for name, part, message in (
        ("codes", packed.parts["codes"].to(torch.uint8), "w.codes are torch.uint8, but must be int8"),
        ("scales", packed.parts["scales"].float(), "w.scales are torch.float32, but must be float16"),
        ("scales", packed.parts["scales"][:, :1], r"w.scales has shape \[6, 1\], but 2:8\+int8/64 needs \[6, 2\]"),
        ("bitmask", packed.parts["bitmask"] * 0, "w.bitmask does not keep 2 of every 8 in 96 of 96 groups"),
    ):
        with pytest.raises(MspError, match=message):
            CodedWeight({**packed.parts, name: part}, packed.storage, packed.shape).check("w")


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:8", "0:8", "8:8", "1:4"])
def test_the_reference_multiplies(pattern: str, dtype: torch.dtype) -> None:
    packed, _ = coded(pattern, dtype=dtype)
    x, bias = torch.randn(2, 3, 128, dtype=dtype, requires_grad=True), torch.randn(6, dtype=dtype)
    y = nm_linear(x, packed, bias)
    assert torch.equal(y, functional.linear(x, packed.unpack(dtype), bias)) and y.dtype == dtype
    assert last_backend("nm_linear") == "reference"
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad[0, 0], packed.unpack(dtype).sum(0).expand(2, 3, -1)[0, 0])
    with force_backend("reference"):
        assert torch.equal(nm_linear(x, packed, bias), y)
    with force_backend("cpu"), pytest.raises(UsageError, match="only the reference takes coded values"):
        nm_linear(x, packed, bias)
    with pytest.raises(ValueError, match="its last dimension must be 128"):
        nm_linear(x[..., :64], packed)


def test_a_module_keeps_codes_and_scales_through_casts_and_copies() -> None:
    packed, _ = coded()
    module = CodedLinear.from_coded(packed, torch.randn(6), torch.float32)
    x = torch.randn(3, 128)
    y = module(x)
    assert list(module.state_dict()) == ["bias", "codes", "scales", "bitmask"]
    assert repr(module) == "CodedLinear(in_features=128, out_features=6, storage=2:8+int8/64, bias=True)"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cast = copy.deepcopy(module).to(dtype)
        assert cast.dtype == dtype == cast.weight.dtype and cast(x.to(dtype)).dtype == dtype
        assert all(torch.equal(part, packed.parts[name]) for name, part in cast.packed.parts.items())
        assert {name: part.dtype for name, part in cast.parts.items()} == {n: p.dtype for n, p in packed.parts.items()}
    other = CodedLinear(128, 6, packed.storage)
    assert torch.equal(other(x), torch.zeros(3, 6))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    with pytest.raises(RuntimeError, match="bitmask does not keep 2 of every 8"):
        other.load_state_dict({**module.state_dict(), "bitmask": packed.parts["bitmask"] * 0})
    with pytest.raises(MspError, match="takes no other values"):
        module.set_values(packed.parts["codes"].float())


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


def coded_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of which each third linear is coded, packed in floats, or dense."""
    torch.manual_seed(0)
    config = llama_like("LlamaConfig", hidden_size=64, intermediate_size=128)() if family == "llama" else gpt2()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    packed: dict[str, Any] = {}
    for at, linear in enumerate(find_structure(model).linears):
        pattern = NMPattern.parse(("2:8", "8:8", "2:8", "1:4", "8:8")[at % 5])
        float_weight = nm_select(linear.weight.detach().contiguous(), pattern)
        packed[linear.name] = quantise_values(float_weight, "int8/64") if at % 5 < 2 else float_weight
    replace_linears(model, packed)
    return model


def gpt2() -> Any:
    config = FAMILIES["gpt2"]()
    config.n_embd = 64
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_comes_back_as_it_was_saved(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = coded_model(family, dtype)
    folder = save_packed(model, None, tmp_path / "out", recipe={})
    info = validate_packed(folder)
    assert {str(linear.storage) for linear in info.linears} == {"2:8+int8/64", "8:8+int8/64", "2:8", "1:4", "8:8"}
    ids = tokens(2, 8, seed=1)
    with torch.no_grad():
        expected = model(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert same_state(model, loaded)
    assert sum(type(module) is CodedLinear for module in loaded.modules()) == sum(
        linear.storage.is_coded for linear in info.linears
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    again = save_packed(load_model(folder).model, None, tmp_path / "again", recipe={})
    if dtype == torch.float32:  # which load_model computes in on a CPU
        assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    # in another dtype the scales are still those of the files
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    name = next(linear.name for linear in info.linears if linear.storage.is_coded)
    assert torch.equal(wide.get_submodule(name).scales, stored[f"{name}.scales"])


def test_info_and_card_tell_storages_and_bytes(tmp_path: Path) -> None:
    model = coded_model("llama", torch.bfloat16)
    folder = save_packed(model, None, tmp_path / "out", recipe={})
    info, stored = read_info(folder), load_file(folder / "model.safetensors")
    data = msp.info(folder, verify=True).to_json()
    for linear, told in zip(info.linears, data["linears"], strict=True):
        own = [stored[f"{linear.name}.{part}"] for part in linear.storage.parts(*linear.shape)]
        assert told["packed_bytes"] == linear.packed_bytes == sum(part.nbytes for part in own)
        assert told["storage"] == str(linear.storage) and told["dtype"] == "BF16"
        assert told["dense_bytes"] == 2 * linear.shape[0] * linear.shape[1]
        if told["storage"] == "2:8+int8/64":
            assert told["bits_per_weight"] == 3.25 and told["pattern"] == "2:8"
        if linear.storage.is_coded:  # no layout of a GPU is for them
            assert not told["dense_on_gpu"] and not told["fast_prefill_bytes"] and not told["slower_from_tokens"]
    total = sum(tensor.nbytes for tensor in stored.values())
    assert info.packed_bytes + info.other_bytes == total
    assert "| 2:8+int8/64 |" in model_card(info) == (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert "2:8+int8/64" in config["quantization_config"]["allocation"].values() and config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("codes", lambda codes: codes.to(torch.uint8), "codes: dtype U8, needs I8"),
        ("codes", lambda codes: codes[:, :-1].contiguous(), "codes: shape"),
        ("scales", lambda scales: scales.to(torch.bfloat16), "scales: dtype BF16, needs F16"),
        ("scales", None, "scales: missing from the checkpoint, and the allocation says"),
        ("codes", lambda codes: codes + 1, "codes is damaged"),
    ],
)
def test_files_that_do_not_fit_are_refused(part: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = save_packed(coded_model("llama"), None, tmp_path / "out", recipe={})
    name = next(linear.name for linear in read_info(folder).linears if str(linear.storage) == "2:8+int8/64")
    stored = load_file(folder / "model.safetensors")
    tensor = stored.pop(f"{name}.{part}")
    if change is not None:
        stored[f"{name}.{part}"] = change(tensor)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (validate_packed, load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(MspError, match=f"{name}.{message}"):
            read(folder)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("2:8+int4/64", "cannot read int4/64 values"),
        ("2:8+int8/128", "64 columns are not a multiple of the 128"),
        ("int8/64", "has no pattern"),
        ("dense", "has no pattern"),
        ("removed", "has no pattern"),
        ("2:8+fp8", "is no storage"),
    ],
)
def test_a_manifest_with_what_cannot_be_read_is_refused(storage: str, message: str, tmp_path: Path) -> None:
    folder = save_packed(coded_model("llama"), None, tmp_path / "out", recipe={})
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    config["quantization_config"]["allocation"][name] = storage
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MspError, match=f"allocation of {name}: .*{message}|{name}: {message}"):
        read_info(folder)


def test_a_weight_at_two_places_is_one(tmp_path: Path) -> None:
    model = coded_model("llama")
    names = [f"model.layers.{index}.self_attn.k_proj" for index in (0, 1)]
    fresh = AutoModelForCausalLM.from_config(model.config)
    for name in names:
        fresh.get_submodule(name).weight = fresh.get_submodule(names[0]).weight
    replace_linears(fresh, {names[1]: coded("2:8", *fresh.get_submodule(names[0]).weight.shape)[0]})
    for shown in (fresh, AutoModelForCausalLM.from_pretrained(save_packed(fresh, None, tmp_path / "out", recipe={}))):
        one, other = (shown.get_submodule(name) for name in names)
        assert type(one) is CodedLinear and one.identity == other.identity
        assert storages_of(shown) == {names[0]: Storage.parse("2:8+int8/64")} and shared_by(shown) == {
            names[1]: names[0]
        }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exported_it_is_the_dense_model_that_computes_the_same(family: str, tmp_path: Path) -> None:
    model = coded_model(family)
    folder = save_packed(model, None, tmp_path / "out", recipe={})
    dense = AutoModelForCausalLM.from_pretrained(export_dense(folder, tmp_path / "dense"))
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    ids = tokens(2, 8, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(MspError, match=r"stored in 2:8\+int8/64, into which no adapter can be merged"):
        peft.get_peft_model(coded_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
