"""What is pruned is what a forward of text runs, whatever else a model has; every other linear has a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LLAMA_LIKE, SMALL, UNUSUAL, build, save_text, tokenizer, tokens
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

import msp
from msp.models.loading import make_skeleton
from msp.models.structure import find_structure
from msp.show.pictures import prune_pictures
from msp.text.token_sets import save_tokens

EVERY = [*FAMILIES, *UNUSUAL]


@pytest.fixture
def text(tmp_path: Path) -> str:
    save_text(tmp_path / "text.txt", seed=0)
    return str(tmp_path / "text.txt")


class Tower(nn.Module):
    """Blocks of linears, like those that read pictures or sound."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(blocks))
        self.projector = nn.Linear(width, 32)


def with_tower(seed: int = 0) -> Any:
    """A language model beside a tower that is far larger, and a list of blocks that nothing runs."""
    model = build("llama", seed)
    model.vision_tower = Tower(3, 128)
    model.model.mtp = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(32, 32)})])
    return model


@pytest.mark.parametrize("family", EVERY)
def test_every_linear_is_pruned_or_has_a_reason(family: str) -> None:
    model = build(family)
    structure = find_structure(model)
    places = [place.name for linear in structure.linears for place in linear.places]
    assert len(places) == len(set(places)) and not {*places} & structure.skipped.keys()
    told = {*places, *structure.outside, *(name.rpartition(".")[0] for name in structure.not_linear)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears <= told, linears - told


@pytest.mark.parametrize("family", EVERY)
def test_a_skeleton_has_the_structure_of_the_model(family: str) -> None:
    model = build(family)
    real, skeleton = find_structure(model), find_structure(make_skeleton(model.config))
    assert [block.name for block in real.blocks] == [block.name for block in skeleton.blocks]
    assert [linear.places for linear in real.linears] and real.failure is None
    named = [[place.name for place in linear.places] for linear in real.linears]
    assert named == [[place.name for place in linear.places] for linear in skeleton.linears]
    assert real.skipped == skeleton.skipped
    if skeleton.failure is None:  # experts are chosen by values, which a skeleton has none of
        # nor can a skeleton tell that a change leaves a value as it was
        assert real.calls == skeleton.calls and real.changes.before.keys() <= skeleton.changes.before.keys()


def test_a_tower_is_left_out_whatever_its_size(text: str) -> None:
    model = with_tower()
    assert sum(p.numel() for p in model.vision_tower.parameters()) > sum(p.numel() for p in model.model.parameters())
    before = {name: tensor.clone() for name, tensor in model.vision_tower.state_dict().items()}
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    result = msp.prune(model, sparsity=0.5, allocator="uniform", tokenizer=tokenizer(), calibration=text, **SMALL)
    assert len(result.allocation) == 14 and all(name.startswith("model.layers.") for name in result.allocation)
    assert result.allocation.keys() | result.skipped.keys() == names
    reasons = {name: reason for name, reason in result.skipped.items() if name != "lm_head"}
    assert set(reasons.values()) == {"a forward of text does not run it"} and len(reasons) == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vision_tower.state_dict().items())
    assert result.density == pytest.approx(0.5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_sees_is_pruned_where_it_reads(stream: bool, tmp_path: Path) -> None:
    """Of a real architecture, with blocks of both kinds in lists of the same name."""
    reads = {**LLAMA_LIKE, "vocab_size": 96, "head_dim": 8, "sliding_window": 8}
    sees = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=reads,
        vision_config={**sees, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=90,
        eoi_token_index=91,
        image_token_index=92,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    save_tokens(tokens(1, 4000, seed=0, vocabulary=89), tmp_path / "tokens.safetensors")
    options = {"sparsity": 0.5, "allocator": "uniform", "calibration": str(tmp_path / "tokens.safetensors"), **SMALL}
    result = msp.prune(tmp_path / "dense", output=tmp_path / "packed", stream=stream, **options)
    assert {name.rpartition(".layers.")[0] for name in result.allocation} == {"model.language_model"}
    towers = [name for name, reason in result.skipped.items() if reason == "a forward of text does not run it"]
    assert len(towers) > 3 * 6 and all("language_model" not in name for name in towers)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    seeing = {name: tensor for name, tensor in loaded.state_dict().items() if "vision_tower" in name}
    assert seeing and all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in seeing.items())


def test_without_a_forward_blocks_are_those_beside_the_embeddings() -> None:
    model = with_tower()
    model.forward = None  # type: ignore[method-assign]
    structure = find_structure(model)
    assert structure.failure is not None and structure.calls is None
    assert {block.name for block in structure.blocks} == {"model.layers.0", "model.layers.1", "model.mtp.0"}
    assert structure.outside["vision_tower.projector"] == "not one of the blocks beside the input embeddings"


def test_all_stacks_are_pruned_in_the_order_of_execution(text: str, tmp_path: Path) -> None:
    model = build("hrm")
    structure = find_structure(model)
    stacks = [block.name.rpartition(".")[0] for block in structure.blocks]
    assert list(dict.fromkeys(stacks)) == ["model.L_module.layers", "model.H_module.layers"]
    assert [block.index for block in structure.blocks] == list(range(8)) and min(structure.calls or ()) > 1
    with pytest.warns(UserWarning, match=r"L_module.layers.0 more than once"):
        result = msp.prune(
            model, sparsity=0.5, allocator="fisher-rank", tokenizer=tokenizer(), calibration=text, **SMALL
        )
    linears = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, msp.SparseLinear))}
    assert result.allocation.keys() | result.skipped.keys() == linears and result.skipped.keys() == {"lm_head"}
    assert all(trace > 0 for trace in (result.sensitivities or {}).values())
    assert all(path.stat().st_size for path in prune_pictures(result, tmp_path / "pictures"))


def test_parts_that_blocks_call_are_no_blocks() -> None:
    model = build("llama")
    model.adapters = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    for layer, adapter in zip(model.model.layers, model.adapters, strict=True):
        layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output, adapter=adapter: adapter(output))
    structure = find_structure(model)
    assert [block.name for block in structure.blocks] == ["model.layers.0", "model.layers.1"]
    assert structure.outside["adapters.1.0"] == "its block is run inside another block"


def test_a_forward_that_fails_is_named(text: str) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(31, 64)
    with pytest.raises(msp.MspError, match=r"a forward of token ids fails: RuntimeError: mat1 and mat2"):
        msp.prune(model, sparsity=0.5, tokenizer=tokenizer(), calibration=text, **SMALL)


@pytest.mark.parametrize("keep", [None, ".*=dense"])
def test_weights_that_a_forward_changes_are_saved_as_they_were_loaded(
    keep: str | None, text: str, tmp_path: Path
) -> None:
    """A model that is loaded changes them again: what is packed is taken as a forward uses it, the rest as it came."""
    dense = build("rwkv")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    stored = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pinned = {"keep": r"2\.feed_forward\.value=dense,3\.attention\.output=dense"} if keep else {}
    options = {"sparsity": 0.3, "calibration": text, "allocator": "uniform", **pinned, **SMALL}
    result = msp.prune(tmp_path / "dense", output=tmp_path / "packed", **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    prompt = tokens(2, 12, seed=1)
    left = {name: tensor for name, tensor in loaded.state_dict().items() if name in stored}
    assert keep is None or "rwkv.blocks.2.feed_forward.value.weight" in left
    assert all(torch.equal(tensor, stored[name]) for name, tensor in left.items())
    with torch.no_grad():
        assert torch.equal(loaded(prompt).logits, result.model(prompt).logits)
        found = dense(prompt).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.equal(again(prompt).logits, found)


def test_a_forward_that_always_changes_weights_is_measured_from_the_same_ones(text: str) -> None:
    model = build("llama")
    norm = model.model.norm

    def shrink(*_: Any) -> None:
        norm.weight.data.mul_(0.9)

    norm.register_forward_pre_hook(shrink)
    before = norm.weight.detach().clone()
    options = {"sparsity": 0.5, "allocator": "uniform", "tokenizer": tokenizer(), "calibration": text, **SMALL}
    with pytest.warns(UserWarning, match=r"every forward changes 1 of its tensors \(model.norm.weight\)"):
        result = msp.prune(model, **options)
    assert torch.equal(norm.weight, before)
    plain = build("llama")
    plain.model.norm.weight.data.mul_(0.9)
    expected = msp.prune(plain, **options)
    assert (result.kl, result.perplexity) == (expected.kl, expected.perplexity)
