"""Perplexity and KL against their definitions in float64."""

import copy
import math

import pytest
import torch
from families import build
from torch.nn import functional

from msp.evaluate import DenseReference, perplexity


@pytest.fixture
def pair():
    dense = build("llama").eval()
    other = copy.deepcopy(dense)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    windows = torch.randint(0, dense.config.vocab_size, (7, 11))
    return dense, other, windows


def by_definition(dense, other, windows: torch.Tensor) -> tuple[float, float]:
    with torch.no_grad():
        p = functional.log_softmax(dense(input_ids=windows).logits.double(), -1)[:, :-1]
        q = functional.log_softmax(other(input_ids=windows).logits.double(), -1)[:, :-1]
    loss = -q.gather(-1, windows[:, 1:, None]).mean()
    return math.exp(loss), float((p.exp() * (p - q)).sum(-1).mean())


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


def test_a_model_does_not_diverge_from_itself(pair) -> None:
    dense, _, windows = pair
    reference = DenseReference(dense, windows)
    assert reference.measure(dense).kl == pytest.approx(0, abs=1e-7)
    assert reference.measure(dense).perplexity == reference.quality.perplexity


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
    monkeypatch.setattr("msp.evaluate.FULL_PRECISION_BYTES", 0)
    assert DenseReference(dense, windows).measure(other).kl == pytest.approx(full, abs=1e-4)


def test_a_broken_model_has_infinite_or_nan_perplexity_not_a_crash(pair) -> None:
    dense, other, windows = pair
    reference = DenseReference(dense, windows)
    other.get_output_embeddings().weight.data *= 1e6
    assert reference.measure(other).perplexity > 1e6
