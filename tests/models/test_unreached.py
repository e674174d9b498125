"""Linears that calibration never reaches are pruned by magnitude, and no allocator takes them for worthless."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, build, save, save_text, tokenizer
from torch import nn

import msp
from msp.formats.patterns import NMPattern
from msp.models.structure import find_structure
from msp.ops import nm_select
from msp.pruners import pruner_names

UNUSED = [f"model.layers.{block}.mlp.experts.1" for block in range(2)]


class TwoExperts(nn.Module):
    """A mixture whose router never chooses the second expert, and one whose output counts for nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x) + 0 * self.experts[2](x)


def experts() -> Any:
    model = build("llama")
    for number, layer in enumerate(model.model.layers):
        layer.mlp = TwoExperts(number)
    return model.eval()


@pytest.fixture
def text(tmp_path: Path) -> str:
    save_text(tmp_path / "text.txt", seed=0)
    return str(tmp_path / "text.txt")


def prune(text: str, **options: Any) -> tuple[msp.PruneResult, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = {"sparsity": 0.5, "tokenizer": tokenizer(), "calibration": text, **SMALL, **options}
        result = msp.prune(experts(), **chosen)
    return result, [str(warning.message) for warning in caught if "calibration token" in str(warning.message)]


@pytest.mark.parametrize("pruner", pruner_names())
@pytest.mark.parametrize("candidates", ["ranks", "database"])
def test_they_are_pruned_by_magnitude_and_named_once(pruner: str, candidates: str, text: str) -> None:
    options = {"allocator": "msp", "evaluations": 8} if candidates == "database" else {"allocator": "uniform"}
    result, told = prune(text, pruner=pruner, candidates=candidates, **options)
    (message,) = told
    assert message.startswith(", ".join(UNUSED) + ": no calibration token comes to them") and "keep" in message
    dense = experts()
    for name in UNUSED:
        pattern = result.allocation[name]
        if not pattern.is_dense:
            expected = nm_select(dense.get_submodule(name).weight.detach(), pattern).unpack()
            assert torch.equal(result.model.get_submodule(name).weight, expected)


def test_fisher_falls_back_where_it_is_zero_throughout(text: str) -> None:
    """A linear that every token goes through, and whose output the loss does not feel."""
    result, _ = prune(text, pruner="fisher", allocator="uniform")
    for block in range(2):
        name = f"model.layers.{block}.mlp.experts.2"
        expected = nm_select(experts().get_submodule(name).weight.detach(), NMPattern(4, 8)).unpack()
        assert torch.equal(result.model.get_submodule(name).weight, expected)


@pytest.mark.parametrize("allocator", ["fisher-knapsack", "fisher-rank", "owl", "uniform"])
def test_no_allocator_that_does_not_search_empties_them(allocator: str, text: str) -> None:
    result, _ = prune(text, allocator=allocator, pruner="wanda")
    for name in UNUSED:
        assert 0.25 <= result.allocation[name].density <= 0.75, result.allocation[name]
    assert result.sensitivities is None or all(result.sensitivities[name] == 0 for name in UNUSED), "as measured"


def test_what_a_few_tokens_do_not_reach_calibration_may(text: str) -> None:
    """A linear that only some tokens go through is calibrated like any other, without a word."""

    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rare = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.often(x) if x.shape[1] < 12 else self.often(x) + self.rare(x)

    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = Rare()
    assert find_structure(model).unreached == {f"model.layers.{block}.mlp.rare" for block in range(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        msp.prune(model, sparsity=0.5, allocator="fisher-rank", tokenizer=tokenizer(), calibration=text, **SMALL)


@pytest.mark.parametrize("stream", [False, True])
def test_cross_attention_with_nothing_to_attend_to_is_named(stream: bool, text: str, tmp_path: Path) -> None:
    save("bart", tmp_path / "dense")
    options = {"sparsity": 0.5, "calibration": text, "allocator": "owl", "pruner": "sparsegpt", **SMALL}
    options |= {"candidates": "ranks"}
    with pytest.warns(UserWarning, match=r"0\.encoder_attn\.k_proj, .* and 4 more: no calibration token"):
        result = msp.prune(tmp_path / "dense", stream=stream, output=tmp_path / "packed", **options)
    assert result.density == pytest.approx(0.5, abs=0.01)
    msp.validate_packed(tmp_path / "packed")
