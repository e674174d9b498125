"""A weight that stands at several places is one linear: pruned once, replaced everywhere, stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, build, nm_units, save_text, tokenizer, tokens
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import msp
from msp import ops
from msp.compressions.nm import NMCompression
from msp.engine.candidates import CandidateModel
from msp.errors import MspError
from msp.evidence.calibration import stream_statistics
from msp.evidence.fisher import fisher_diagonals, fisher_traces
from msp.models.stored import load_stored
from msp.models.structure import find_structure
from msp.packed.sparse_linear import SparseLinear
from msp.pruners import pruner_names

NEEDS = frozenset({"input_sum_squares", "hessian"})


def one_parameter() -> Any:
    """Linears of two blocks with one weight, and biases of their own."""
    model = build("llama-tied")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    second.o_proj.weight = first.o_proj.weight
    return model


def one_module() -> Any:
    """A linear with a bias, and a part with three linears, that two blocks have as the same objects."""
    model = build("llama-tied")
    first, second = model.model.layers
    second.self_attn.q_proj = first.self_attn.q_proj
    second.mlp = first.mlp
    return model


MODELS = {"zamba2": lambda: build("zamba2"), "one parameter": one_parameter, "one module": one_module}
SHARED = {"zamba2": 12, "one parameter": 2, "one module": 4}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def text(tmp_path: Path) -> str:
    save_text(tmp_path / "text.txt", seed=0)
    return str(tmp_path / "text.txt")


def windows(sequences: int = 4) -> torch.Tensor:
    return tokens(sequences, 12, seed=3)


def test_each_weight_is_one_linear(kind: str) -> None:
    model = MODELS[kind]()
    structure = find_structure(model)
    assert sum(bool(linear.others) for linear in structure.linears) == SHARED[kind]
    weights = {id(place.module.weight) for linear in structure.linears for place in linear.places}
    assert len(weights) == len(structure.linears)
    for linear in structure.linears:
        assert all(place.module.weight is linear.module.weight for place in linear.places)
        assert [place.block for place in linear.places] == sorted({place.block for place in linear.places})


@pytest.mark.parametrize("sequential", [False, True])
def test_statistics_are_of_all_places(kind: str, sequential: bool) -> None:
    """As the model is when the first block of the weight is looked at."""
    model, twin = MODELS[kind](), MODELS[kind]()
    structure, linears = find_structure(model), find_structure(twin).linears
    stream = stream_statistics(model, structure, windows(), NEEDS, sequential=sequential, batch_size=2)
    for block, statistics in stream:
        inputs: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in block.linears}

        def hook_for(parts: list[torch.Tensor]) -> Any:
            return lambda module, args: parts.append(args[0].flatten(0, -2).double())

        own = [linear for linear in linears if linear.name in inputs]
        hooks = [x.register_forward_pre_hook(hook_for(inputs[linear.name])) for linear in own for x in linear.modules]
        with torch.no_grad():
            twin(windows(), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, parts in inputs.items():
            x = torch.cat(parts)
            assert statistics[name].tokens == len(x)
            torch.testing.assert_close(statistics[name].hessian.double(), x.t() @ x, rtol=1e-4, atol=1e-4)
        for linear in (*block.linears, *own) if sequential else ():
            linear.weight.mul_(0.5)


def test_sensitivities_are_of_the_shared_weight(kind: str) -> None:
    model = MODELS[kind]()
    linears = find_structure(model).linears
    expected = {linear.name: torch.zeros(linear.shape) for linear in linears}
    for window in windows(2):
        logits = model(window[None], use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, window[1:])
        weights = [linear.module.weight.requires_grad_() for linear in linears]
        for linear, gradient in zip(linears, torch.autograd.grad(loss, weights), strict=True):
            expected[linear.name] += gradient.square() / 2
    traces, diagonals = fisher_traces(model, linears, windows(2)), fisher_diagonals(model, linears, windows(2))
    for name, diagonal in expected.items():
        torch.testing.assert_close(diagonals[name], diagonal, rtol=1e-3, atol=1e-8)
        assert traces[name] == pytest.approx(float(diagonal.sum()), rel=1e-3)


def test_candidates_change_every_place(kind: str) -> None:
    model, twin = MODELS[kind](), MODELS[kind]()
    structure = find_structure(model)
    prompt = tokens(2, 9, seed=1)
    units = nm_units(structure.linears)
    ranks = {x.name: {8: ops.nm_rank(x.weight.contiguous(), 8)} for x in structure.linears}
    with CandidateModel(model, structure, NMCompression(structure, ranks), units) as candidate, torch.no_grad():
        candidate.apply([5] * len(units))
        found = model(prompt).logits
    for linear in find_structure(twin).linears:
        linear.weight.copy_(ops.nm_keep(linear.weight.contiguous(), ranks[linear.name][8], 5))
    with torch.no_grad():
        torch.testing.assert_close(found, twin(prompt).logits)
        assert not any(isinstance(module, SparseLinear) for module in model.modules())
        assert torch.equal(model(prompt).logits, MODELS[kind]()(prompt).logits), "it is dense again"


@pytest.mark.parametrize("pruner", pruner_names())
def test_pruned_once_replaced_everywhere_and_stored_once(kind: str, pruner: str, text: str, tmp_path: Path) -> None:
    dense = MODELS[kind]()
    structure = find_structure(dense)
    names = {linear.name: [place.name for place in linear.places] for linear in structure.linears}
    weights = sum(linear.weight.numel() for linear in structure.linears)
    options = {"sparsity": 0.5, "allocator": "uniform", "pruner": pruner, "calibration": text, **SMALL}
    result = msp.prune(MODELS[kind](), tokenizer=tokenizer(), output=tmp_path / "packed", **options)
    assert result.allocation.keys() == names.keys() and result.kept == weights // 2
    info = msp.read_info(tmp_path / "packed")
    assert info.weights == weights and info.kept == weights // 2
    assert set(info.manifest.shared) == {other for _, *others in names.values() for other in others}
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(name.endswith(".values") for name in stored) == len(names)
    assert result.bytes["packed"] == sum(tensor.nbytes for tensor in stored.values())
    msp.validate_packed(tmp_path / "packed")

    # the packed model is the dense one with the same weights masked at all places, whatever the biases there
    twin, prompt = MODELS[kind](), tokens(2, 12, seed=1)
    for linear in find_structure(twin).linears:
        module = result.model.get_submodule(linear.name)
        assert isinstance(module, SparseLinear)
        linear.weight.copy_(module.weight)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()
    with torch.no_grad():
        expected = twin(prompt).logits
        for packed in (result.model, loaded, again):
            for places in names.values():
                values = [packed.get_submodule(place).values for place in places]
                assert all(value is values[0] for value in values)
            torch.testing.assert_close(packed(prompt).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(prompt).logits, result.model(prompt).logits)


def test_a_shared_linear_that_stays_dense_is_loaded_everywhere(kind: str, text: str, tmp_path: Path) -> None:
    options = {"allocator": "fisher-rank", "patterns": "4:8,8:8", "calibration": text, **SMALL}
    result = msp.prune(MODELS[kind](), sparsity=0.25, tokenizer=tokenizer(), output=tmp_path / "packed", **options)
    assert {str(pattern) for pattern in result.allocation.values()} == {"4:8", "8:8"}
    loaded, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval(), tokens(2, 12, seed=1)
    with torch.no_grad():
        assert torch.equal(loaded(prompt).logits, result.model(prompt).logits)


@pytest.mark.parametrize("allocator", ["msp", "owl", "fisher-knapsack"])
def test_search_and_evidence_count_it_once(allocator: str, kind: str, text: str) -> None:
    options = {"allocator": allocator, "evaluations": 8, "calibration": text, **SMALL}
    result = msp.prune(MODELS[kind](), sparsity=0.5, tokenizer=tokenizer(), **options)
    assert result.density == pytest.approx(0.5, abs=0.01) and result.kl > 0


def test_a_weight_that_something_else_has_too_is_left_alone() -> None:
    model = build("llama")
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 96, bias=False)
    model.model.layers[0].mlp.gate_proj.weight = model.lm_head.weight
    structure = find_structure(model)
    assert structure.outside["model.layers.0.mlp.gate_proj"] == "its weight is that of lm_head.weight too"
    assert len(structure.linears) == 13


def test_streamed_a_shared_weight_is_refused(tmp_path: Path) -> None:
    build("zamba2").save_pretrained(tmp_path)
    with pytest.raises(MspError, match=r"are one weight: load this model whole"):
        load_stored(tmp_path, device=torch.device("cpu"))


def test_a_manifest_with_a_wrong_place_is_refused(text: str, tmp_path: Path) -> None:
    options = {"sparsity": 0.5, "allocator": "uniform", "calibration": text, **SMALL}
    path = tmp_path / "packed"
    msp.prune(build("zamba2"), tokenizer=tokenizer(), output=path, **options)
    config = (path / "config.json").read_text()
    place = next(iter(msp.read_info(path).manifest.shared))
    for wrong, message in ((place.replace("3", "9"), "no such linear"), ("", "not a linear")):
        (path / "config.json").write_text(config.replace(f'"{place}"', f'"{wrong}"'))
        with pytest.raises(MspError, match=message):
            AutoModelForCausalLM.from_pretrained(path)


def test_dequantized_it_is_one_weight_again(kind: str, text: str, tmp_path: Path) -> None:
    options = {"sparsity": 0.5, "allocator": "uniform", "calibration": text, **SMALL}
    result = msp.prune(MODELS[kind](), tokenizer=tokenizer(), output=tmp_path / "packed", **options)
    loaded, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval(), tokens(2, 12, seed=1)
    with torch.no_grad():
        expected = result.model(prompt).logits
        dense = loaded.dequantize()
        torch.testing.assert_close(dense(prompt).logits, expected, rtol=1e-4, atol=1e-5)
    for linear in find_structure(dense).linears:
        assert all(place.module.weight is linear.module.weight for place in linear.places)
    if kind == "zamba2":  # whose architecture ties these weights itself
        dense.save_pretrained(tmp_path / "dense")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        with torch.no_grad():
            assert torch.equal(again(prompt).logits, dense(prompt).logits)


def test_an_adapter_on_one_of_several_places_is_refused(text: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"sparsity": 0.5, "allocator": "uniform", "calibration": text, **SMALL}
    result = msp.prune(build("zamba2"), tokenizer=tokenizer(), **options)
    with pytest.raises(MspError, match=r"stands at 3 places"):
        peft.get_peft_model(result.model, peft.LoraConfig(target_modules=["q_proj"]))
