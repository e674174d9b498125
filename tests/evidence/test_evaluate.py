"""Perplexity and KL against their definitions in float64."""

import copy
import math

import pytest
import torch
from families import build, tokens
from torch.nn import functional

import msp.evidence.head
from msp.evidence.evaluate import DenseReference, perplexity
from msp.evidence.head import Output, outputs, outputs_of


@pytest.fixture
def pair():
    dense = build("llama").eval()
    other = copy.deepcopy(dense)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    windows = torch.randint(0, dense.config.vocab_size, (7, 11))
    return dense, other, windows


@pytest.fixture(params=["whole batches", "pieces", "hidden states"])
def vocabulary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways in which predictions are computed; that of a large vocabulary is the last."""
    if request.param != "whole batches":
        monkeypatch.setitem(msp.evidence.head.PIECE_BYTES, "cpu", 3 * 96 * 4)
    if request.param == "hidden states":
        monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)


def by_definition(dense, other, windows: torch.Tensor) -> tuple[float, float]:
    with torch.no_grad():
        p = functional.log_softmax(dense(input_ids=windows).logits.double(), -1)[:, :-1]
        q = functional.log_softmax(other(input_ids=windows).logits.double(), -1)[:, :-1]
    loss = -q.gather(-1, windows[:, 1:, None]).mean()
    return math.exp(loss), float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.usefixtures("vocabulary")
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_figures_follow_their_definitions(pair, batch_size: int) -> None:
    dense, other, windows = pair
    reference = DenseReference(dense, windows, batch_size=batch_size)
    expected_perplexity, expected_kl = by_definition(dense, other, windows)
    found = reference.measure(other)
    assert found.perplexity == pytest.approx(expected_perplexity, rel=1e-4)
    assert found.kl == pytest.approx(expected_kl, rel=1e-3)
    assert found.tokens == 7 * 10
    assert perplexity(other, windows, batch_size=batch_size).perplexity == pytest.approx(expected_perplexity, rel=1e-4)


@pytest.mark.usefixtures("vocabulary")
def test_a_model_does_not_diverge_from_itself(pair) -> None:
    dense, _, windows = pair
    reference = DenseReference(dense, windows)
    assert reference.measure(dense).kl == pytest.approx(0, abs=1e-7)
    assert reference.measure(dense).perplexity == reference.quality.perplexity


@pytest.mark.usefixtures("vocabulary")
def test_parts_add_up_to_the_whole(pair) -> None:
    dense, other, windows = pair
    reference = DenseReference(dense, windows, batch_size=2)
    whole = reference.sums(other, range(reference.batches))
    first, rest = reference.sums(other, [0]), reference.sums(other, range(1, reference.batches))
    first += rest
    assert first.loss == pytest.approx(whole.loss, rel=1e-6)
    assert first.divergence == pytest.approx(whole.divergence, rel=1e-6)
    assert (first.predicted, first.tokens) == (whole.predicted, whole.tokens) == (70, 77)


def test_half_precision_references_hardly_move_the_kl(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, other, windows = pair
    full = DenseReference(dense, windows).measure(other).kl
    monkeypatch.setattr("msp.evidence.evaluate.FULL_PRECISION_BYTES", 0)
    assert DenseReference(dense, windows).measure(other).kl == pytest.approx(full, abs=1e-4)


def test_a_broken_model_has_infinite_or_nan_perplexity_not_a_crash(pair) -> None:
    dense, other, windows = pair
    reference = DenseReference(dense, windows)
    other.get_output_embeddings().weight.data *= 1e6
    assert reference.measure(other).perplexity > 1e6


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt-neox", "mixtral"])
def test_a_large_vocabulary_gives_the_figures_of_a_small_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, other = build(family), build(family, seed=1)
    windows = tokens(5, 12, seed=2)
    small = DenseReference(dense, windows, batch_size=2)
    expected = small.total(other)
    monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)
    monkeypatch.setitem(msp.evidence.head.PIECE_BYTES, "cpu", 7 * 96 * 4)
    large = DenseReference(dense, windows, batch_size=2)
    assert all(output.head is dense.get_output_embeddings() for output in outputs(dense, windows.split(2)))
    assert large.quality.perplexity == pytest.approx(small.quality.perplexity, rel=1e-6)
    for found in (large.total(other), large.sums(other, range(large.batches))):
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.divergence == pytest.approx(expected.divergence, rel=1e-6)
        assert (found.predicted, found.tokens) == (expected.predicted, expected.tokens)
    # What has logits of its own, a search say, is compared with the same reference.
    logits = other(input_ids=windows[:2]).logits
    assert large.compare(0, logits).divergence == pytest.approx(small.compare(0, logits).divergence, rel=1e-6)


def test_predictions_are_computed_in_the_precision_of_the_head(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, other, windows = pair
    monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)
    reference = DenseReference(dense, windows)
    logits = other(input_ids=windows).logits
    expected = reference.compare(0, logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert reference.compare(0, logits) == expected


def test_a_soft_cap_behind_the_head_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, other = build("gemma2"), build("gemma2", seed=1)
    windows = tokens(4, 9, seed=3)
    monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)
    assert all(output.head is None for output in outputs(dense, windows.split(2)))
    found = DenseReference(dense, windows, batch_size=2).measure(other)
    expected_perplexity, expected_kl = by_definition(dense, other, windows)
    assert found.perplexity == pytest.approx(expected_perplexity, rel=1e-4)
    assert found.kl == pytest.approx(expected_kl, rel=1e-3)


def test_a_scale_in_place_behind_the_head_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = build("llama")
    windows = tokens(2, 9, seed=3)
    monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)
    with torch.no_grad():
        scaled = (dense(input_ids=batch).logits.mul_(0.5) for batch in windows.split(1))
        assert all(output.head is None for output in outputs_of(dense, scaled))


def test_the_head_works_again_after_each_forward(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _, windows = pair
    before = dense(input_ids=windows).logits
    monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)
    for _ in outputs(dense, windows.split(3)):
        assert torch.equal(dense(input_ids=windows).logits, before)
    with pytest.raises(IndexError):
        list(outputs(dense, [windows, windows + 96]))
    assert torch.equal(dense(input_ids=windows).logits, before)


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (2, 300)])
@pytest.mark.parametrize("rows", [1, 4, 7, 100_000])
def test_pieces_cover_every_prediction_once(shape: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(msp.evidence.head.PIECE_BYTES, "cpu", rows * 10 * 4)
    seen = torch.zeros(shape, dtype=torch.int64)
    for piece in Output(torch.zeros(*shape, 6), vocabulary=10).pieces():
        assert 0 < seen[piece].numel() <= rows
        seen[piece] += 1
    assert (seen[:, :-1] == 1).all() and (seen[:, -1] == 0).all()
