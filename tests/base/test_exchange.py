"""What blocks exchange beside hidden states reaches a block that runs alone, or the model runs whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, build, save, save_text, tokenizer, tokens
from torch import nn

import msp
from msp.errors import MspError
from msp.evidence.calibration import stream_statistics
from msp.evidence.fisher import fisher_traces
from msp.evidence.streamed import streamed_fisher_traces, streamed_logits
from msp.models.gates import GatedModel
from msp.models.stored import load_stored
from msp.models.structure import find_structure
from msp.pruners import pruner_names

CPU = torch.device("cpu")
NEEDS = frozenset({"input_sum_squares"})


class Wrapped(nn.Module):
    """A block with a linear of its own in front of it."""

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        self.block, self.index = block, index
        self.mix = nn.Linear(32, 32, bias=False)


class InMapping(Wrapped):
    """The first block leaves a tensor in a dictionary that all are called with."""

    def forward(self, hidden_states: torch.Tensor, shared: dict[str, Any] | None = None, **kwargs: Any) -> torch.Tensor:
        assert shared is not None
        if self.index == 0:
            shared["first"] = (self.mix(hidden_states), hidden_states.mean(-1))
            return self.block(hidden_states, **kwargs)
        key, value = shared["first"]
        return self.block(hidden_states + key * value[..., None], **kwargs)


class InList(Wrapped):
    """Each block adds to a list that all are called with."""

    def forward(self, hidden_states: torch.Tensor, shared: list[torch.Tensor] | None = None, **kwargs: Any) -> Any:
        assert shared is not None
        shared.append(self.mix(hidden_states))
        return self.block(sum(shared, hidden_states), **kwargs)


class InAttribute(Wrapped):
    """The first block leaves a tensor in an attribute of the class: nothing of it passes a gate."""

    seen: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if self.index == 0:
            type(self).seen = self.mix(hidden_states)
        return self.block(hidden_states + type(self).seen, **kwargs)


def handing(kind: type[Wrapped], container: type) -> Any:
    """A Llama whose forward makes a container and calls every block with it."""
    model = build("llama")
    inner = model.model
    torch.manual_seed(1)
    inner.layers = nn.ModuleList(kind(layer, index) for index, layer in enumerate(inner.layers))
    made: list[Any] = []
    inner.register_forward_pre_hook(lambda *_: made.__setitem__(slice(None), [container()]))
    forward = inner.forward

    def with_shared(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, shared=made[0], **kwargs)

    inner.forward = with_shared
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "gemma4": lambda: build("gemma4"),
    "mapping": lambda: handing(InMapping, dict),
    "list": lambda: handing(InList, list),
}
WHOLE: dict[str, Callable[[], Any]] = {
    "attribute": lambda: handing(InAttribute, dict),
    "hrm": lambda: build("hrm"),
}


@pytest.fixture
def text(tmp_path: Path) -> str:
    save_text(tmp_path / "text.txt", seed=0)
    return str(tmp_path / "text.txt")


def windows(sequences: int = 5) -> torch.Tensor:
    return tokens(sequences, 12, seed=3)


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_that_exchange_run_one_by_one(kind: str) -> None:
    model = MODELS[kind]()
    structure = find_structure(model)
    with GatedModel(model, structure) as gates:
        assert gates.why_not_one_by_one(windows(1)) is None
        states: list[Any] = [None] * 2
        batches = windows(4).split(2)
        for block in structure.blocks:
            states = [gates.block(block.index, batch, state) for batch, state in zip(batches, states, strict=True)]
        found = [gates.logits(batch, state) for batch, state in zip(batches, states, strict=True)]
    with torch.no_grad():
        for batch, logits in zip(batches, found, strict=True):
            assert torch.equal(logits, model(batch, use_cache=False).logits)


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_run_alone_says_why(kind: str) -> None:
    model = WHOLE[kind]()
    with GatedModel(model, find_structure(model)) as gates:
        why = gates.why_not_one_by_one(windows(1))
    assert why is not None and ("more than once" in why) == (kind == "hrm")


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", [*MODELS, *WHOLE])
def test_statistics_are_those_of_the_whole_model(kind: str, sequential: bool) -> None:
    """Behind what the caller has changed of earlier blocks, if blocks are taken in turn."""
    made = {**MODELS, **WHOLE}[kind]
    model, twin = made(), made()
    structure, twins = find_structure(model), {linear.name: linear for linear in find_structure(twin).linears}
    stream = stream_statistics(
        model, structure, windows(), NEEDS, sequential=sequential, batch_size=2, whole=kind in WHOLE
    )
    checked = 0
    for block, statistics in stream:
        inputs: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in block.linears}

        def hook_for(parts: list[torch.Tensor]) -> Any:
            return lambda module, args: parts.append(args[0].flatten(0, -2).double())

        hooks = [twins[name].module.register_forward_pre_hook(hook_for(parts)) for name, parts in inputs.items()]
        with torch.no_grad():
            for batch in windows().split(2):
                twin(batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, parts in inputs.items():
            if parts:
                x = torch.cat(parts)
                assert statistics[name].tokens == len(x)
                found = statistics[name].input_sum_squares
                torch.testing.assert_close(found.double(), x.square().sum(0), rtol=1e-4, atol=1e-5)
                checked += 1
        for linear in block.linears if sequential else ():
            linear.weight.mul_(0.5)
            twins[linear.name].weight.mul_(0.5)
    assert checked >= len(structure.linears) - 1


@pytest.mark.parametrize("pruner", pruner_names())
@pytest.mark.parametrize("kind", ["gemma4", "mapping", "attribute"])
def test_every_pruner_prunes_such_models(kind: str, pruner: str, text: str) -> None:
    model = {**MODELS, **WHOLE}[kind]()
    options = {"sparsity": 0.5, "allocator": "uniform", "pruner": pruner, "calibration": text, **SMALL}
    if kind in WHOLE:
        with pytest.warns(UserWarning, match="the whole model for each of them"):
            result = msp.prune(model, tokenizer=tokenizer(), **options)
    else:
        result = msp.prune(model, tokenizer=tokenizer(), **options)
    assert result.density == pytest.approx(0.5, abs=0.01) and 0 < result.kl < 20


@pytest.mark.parametrize("kind", [*MODELS, *WHOLE])
def test_a_search_measures_what_the_model_does(kind: str, text: str) -> None:
    """Its loss of what it found is that of the model with the same weights kept, run as a whole."""
    made = {**MODELS, **WHOLE}[kind]
    options = {"allocator": "msp", "evaluations": 8, "pruner": "magnitude", "calibration": text, **SMALL}
    result = msp.prune(made(), sparsity=0.5, tokenizer=tokenizer(), **options)
    assert result.search_fitness is not None
    # magnitude keeps what it keeps whatever came before; candidates may be run with products in bf16
    assert result.search_fitness["candidate"] == pytest.approx(result.search_fitness["pruned"], rel=0.05, abs=1e-3)


def test_streamed_states_carry_what_blocks_exchange(tmp_path: Path) -> None:
    model = save("gemma4", tmp_path)
    loaded, structure = load_stored(tmp_path, device=CPU)
    with torch.no_grad():
        expected = model(windows(), use_cache=False).logits
    found = torch.cat([*streamed_logits(loaded.model, structure, windows(), batch_size=2)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # the backward goes through shared keys and values to the blocks that made them
    traces = fisher_traces(model, find_structure(model).linears, windows(2))
    for room in (2**30, 0):
        streamed = streamed_fisher_traces(loaded.model, structure, windows(2), hidden_bytes=room)
        assert streamed == pytest.approx(traces, rel=1e-4)


@pytest.mark.parametrize("allocator", ["fisher-rank", "msp"])
def test_streamed_and_in_memory_find_the_same(allocator: str, text: str, tmp_path: Path) -> None:
    save("gemma4", tmp_path / "dense")
    options = {"sparsity": 0.5, "allocator": allocator, "calibration": text, **SMALL}
    options |= {"evaluations": 8} if allocator == "msp" else {}
    expected = msp.prune(tmp_path / "dense", **options)
    found = msp.prune(tmp_path / "dense", stream=True, output=tmp_path / "packed", **options)
    assert found.allocation == expected.allocation and found.kl == pytest.approx(expected.kl, rel=1e-4)


def test_blocks_that_remember_are_told() -> None:
    class Remembering(Wrapped):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            self.last = {"input": [hidden_states]}
            return self.block(hidden_states, **kwargs)

    model = handing(Remembering, dict)
    assert find_structure(model).remembering == ("model.layers.0", "model.layers.1")
    assert not find_structure(build("gemma4")).remembering and not find_structure(build("zamba2")).remembering


@pytest.mark.parametrize("family", ["hrm", "rwkv"])
def test_streamed_what_cannot_run_alone_is_refused(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    with pytest.raises(MspError, match="load this model whole"):
        load_stored(tmp_path, device=CPU)


def test_a_forward_that_does_not_come_to_a_block_is_named() -> None:
    model = build("llama")
    structure = find_structure(model)
    model.forward = lambda **kwargs: None
    with (
        GatedModel(model, structure) as gates,
        pytest.raises(MspError, match=r"ends without coming to model\.layers\.0"),
    ):
        gates.block(0, windows(1))
