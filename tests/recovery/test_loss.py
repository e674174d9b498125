"""The loss of recovery against its definition in float64, and its gradient."""

from __future__ import annotations

import pytest
import torch
from families import build, tokens
from torch import Tensor

import msp.evidence.head
from msp.errors import UsageError
from msp.evidence.evaluate import DenseReference, Sums
from msp.evidence.head import Forward, Output
from msp.recovery import LossWeights, distillation_loss

WEIGHTS = [LossWeights(), LossWeights(1.0, 0.0), LossWeights(0.0, 1.0), LossWeights(0.3, 2.0)]


@pytest.fixture(params=["whole batches", "pieces", "hidden states"])
def vocabulary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways in which predictions are computed; that of a large vocabulary is the last."""
    if request.param != "whole batches":
        monkeypatch.setitem(msp.evidence.head.PIECE_BYTES, "cpu", 3 * 96 * 4)
    if request.param == "hidden states":
        monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)
    return str(request.param)


def by_definition(student: Tensor, teacher: Tensor, windows: Tensor, weights: LossWeights) -> Tensor:
    """From logits ``[B, T, V]``, in float64."""
    p, q = (logits.double().log_softmax(-1)[:, :-1] for logits in (teacher, student))
    cross_entropy = -q.gather(-1, windows[:, 1:, None]).mean()
    return weights.kl * (p.exp() * (p - q)).sum(-1).mean() + weights.cross_entropy * cross_entropy


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_loss_and_its_gradient_follow_the_definition(vocabulary: str, weights: LossWeights) -> None:
    student, teacher, windows = build("llama", 1), build("llama", 2), tokens(3, 11, 5)
    run, dense = Forward(student, windows), Forward(teacher, windows)
    with torch.no_grad():
        taught = dense(windows)
        expected_teacher = teacher(input_ids=windows).logits
    assert (taught.head is not None) == (vocabulary == "hidden states")
    loss = distillation_loss(run(windows), taught if weights.kl else None, windows, weights)
    loss.backward()
    found = {name: each.grad.clone() for name, each in student.named_parameters()}
    student.zero_grad()
    student.double()
    expected = by_definition(student(input_ids=windows).logits, expected_teacher, windows, weights)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_gradients_by_differences() -> None:
    """In float64, so that a wrong factor of one of the two parts shows."""
    windows = tokens(2, 5, 3, vocabulary=7)
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=draw, dtype=torch.float64) for _ in range(2))

    def loss(logits: Tensor) -> Tensor:
        return by_definition(logits, teacher, windows, LossWeights())

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    ours = student.detach().float().requires_grad_()
    distillation_loss(Output.of_logits(ours), Output.of_logits(teacher.float()), windows).backward()
    (gradient,) = torch.autograd.grad(loss(student), student)
    torch.testing.assert_close(ours.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_the_held_out_loss_is_the_loss(vocabulary: str) -> None:
    student, teacher, windows = build("gpt2", 1), build("gpt2", 2), tokens(6, 9, 4)
    total = DenseReference(teacher, windows, batch_size=2).total(student)
    with torch.no_grad():
        logits = [model(input_ids=windows).logits for model in (student, teacher)]
    for weights in WEIGHTS:
        expected = by_definition(*logits, windows, weights)
        assert weights.of(total) == pytest.approx(float(expected), rel=1e-4)


def test_a_model_does_not_diverge_from_itself() -> None:
    model, windows = build("llama"), tokens(2, 9, 1)
    output = Forward(model, windows)(windows)
    loss = distillation_loss(output, output, windows, LossWeights(1.0, 0.0))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_weights_that_are_none() -> None:
    assert LossWeights.of_share(0.25) == LossWeights(0.25, 0.75)
    assert LossWeights(1.0, 3.0).of(Sums(loss=4.0, divergence=2.0, predicted=2)) == 7.0
    for kl, cross_entropy in ((-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf")), (0.0, 0.0)):
        with pytest.raises(UsageError):
            LossWeights(kl, cross_entropy)
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        LossWeights.of_share(1.5)


def test_outputs_that_do_not_fit() -> None:
    windows = tokens(2, 5, 3, vocabulary=7)
    student, teacher = Output.of_logits(torch.zeros(2, 5, 7)), Output.of_logits(torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match="7 and 8 words"):
        distillation_loss(student, teacher, windows)
    with pytest.raises(ValueError, match="no output of the dense model"):
        distillation_loss(student, None, windows)
