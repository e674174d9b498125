"""Candidates in a live model, and what they are measured on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import build, nm_units, tokens

from msp import ops
from msp.compressions import nm_weights
from msp.compressions.nm import NMCompression
from msp.engine.candidates import CandidateModel, LocalRunner, forward_in_bf16
from msp.engine.fitness import TokenFitness, stage_batches, windows_per_batch
from msp.evidence.evaluate import DenseReference
from msp.models.structure import find_structure

GROUP = 8


@pytest.fixture(scope="module")
def setting():
    """A tiny Llama, its linears' rank codes by magnitude and a unit for each."""
    model = build("llama")
    structure = find_structure(model)
    linears = structure.linears
    ranks = {linear.name: {GROUP: ops.nm_rank(linear.weight.contiguous(), GROUP)} for linear in linears}
    return model, structure, ranks, nm_units(linears, GROUP)


def masked(model, ranks, units, levels):
    copied = copy.deepcopy(model)
    for unit, level in zip(units, levels, strict=True):
        weight = copied.get_submodule(unit.name).weight
        weight.data *= (ranks[unit.name][GROUP] < level).to(weight)
    return copied


def drawn(units, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, GROUP + 1, len(units))


def test_a_candidate_is_the_masked_dense_model(setting) -> None:
    model, structure, ranks, units = setting
    windows = tokens(2, 9, seed=1, vocabulary=model.config.vocab_size)
    before = model(input_ids=windows).logits
    with CandidateModel(model, structure, NMCompression(structure, ranks), units) as candidate, torch.no_grad():
        for seed in range(4):
            levels = drawn(units, seed)
            candidate.apply(levels)
            want = masked(model_of(candidate, structure.linears), ranks, units, levels)
            assert torch.equal(candidate.model(input_ids=windows).logits, want(input_ids=windows).logits)
    assert torch.equal(model(input_ids=windows).logits, before)


def model_of(candidate: CandidateModel, linears):
    """A copy of the model with its dense linears."""
    copied = copy.deepcopy(candidate.model)
    for linear in linears:
        copied.set_submodule(linear.name, copy.deepcopy(linear.module))
    return copied


@pytest.mark.parametrize("measure", ["kl", "perplexity"])
@pytest.mark.parametrize("tiles", [False, True])
def test_fitness_is_the_loss_on_all_tokens(setting, measure: str, tiles: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: tiles)
    model, structure, ranks, units = setting
    assert forward_in_bf16(model) is tiles
    windows = tokens(12, 9, seed=2, vocabulary=model.config.vocab_size)
    reference = DenseReference(model, windows, batch_size=2)
    levels = drawn(units, 7)
    quality = reference.measure(masked(model, ranks, units, levels))
    want = quality.kl if measure == "kl" else np.log(quality.perplexity)
    with CandidateModel(model, structure, NMCompression(structure, ranks), units) as candidate:
        fitness = TokenFitness(LocalRunner(candidate, reference, structure), measure=measure)
        assert fitness([levels], fitness.stages - 1)[0] == pytest.approx(want, rel=2e-2 if tiles else 1e-5)


def test_a_later_stage_pays_for_the_rest_only(setting) -> None:
    model, structure, ranks, units = setting
    windows = tokens(16, 9, seed=3, vocabulary=model.config.vocab_size)
    reference = DenseReference(model, windows, batch_size=1)
    levels = drawn(units, 8)
    with CandidateModel(model, structure, NMCompression(structure, ranks), units) as candidate:
        whole = TokenFitness(LocalRunner(candidate, reference, structure))
        assert whole.stages == 3
        expected = whole([levels], 2)
        fitness = TokenFitness(LocalRunner(candidate, reference, structure))
        spent = []
        for stage in range(3):
            found = fitness([levels], stage)
            spent.append(fitness.tokens // 9)
        assert spent == [1, 4, 16]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_draw_takes_other_tokens_of_the_same_number(setting, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    model, structure, ranks, units = setting
    reference = DenseReference(model, tokens(16, 9, seed=5, vocabulary=model.config.vocab_size), batch_size=1)
    levels = drawn(units, 10)
    with CandidateModel(model, structure, NMCompression(structure, ranks), units) as candidate:
        fitness = TokenFitness(LocalRunner(candidate, reference, structure))
        by_draw = [[fitness([levels], stage, draw)[0] for stage in range(3)] for draw in range(4)]
        candidate.apply(levels)
        parts = [reference.sums(candidate.model, [batch]).divergence / 8 for batch in range(16)]
    assert fitness.tokens == 4 * 16 * 9
    assert len({first for first, _, _ in by_draw}) > 1
    assert by_draw[0][0] == pytest.approx(parts[0], rel=1e-5)
    for first, second, last in by_draw:
        assert any(first == pytest.approx(part, rel=1e-5) for part in parts)
        assert last == pytest.approx(sum(parts) / 16, rel=1e-5)
        assert second != last


def test_a_candidate_that_predicts_nan_loses(setting, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    model, structure, ranks, units = setting
    reference = DenseReference(model, tokens(2, 9, seed=4, vocabulary=model.config.vocab_size))
    with CandidateModel(model, structure, NMCompression(structure, ranks), units) as candidate:
        fitness = TokenFitness(LocalRunner(candidate, reference, structure))
        monkeypatch.setattr(
            nm_weights.RankedLinear,
            "forward",
            lambda self, x: x.new_full((*x.shape[:-1], self.out_features), float("nan")),
        )
        assert fitness([drawn(units, 9)], 0) == [float("inf")]


@pytest.mark.parametrize("window", [16, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("forwarded", [2048, 16384], ids=["cpu", "cuda"])
def test_a_race_begins_on_the_share_that_the_docs_name(window: int, forwarded: int) -> None:
    least, most = max(1, 512 // window), max(1, forwarded // window)
    for windows in range(1, 1200):
        size = windows_per_batch(windows, least, most)
        assert least <= size <= most
        first = min(windows, size * stage_batches(1 / 32, -(-windows // size)))
        meant = min(windows, max(least, windows / 32))
        assert abs(first - meant) <= max(0.5, 0.1 * meant), (windows, size)
