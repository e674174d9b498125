"""The loss of recovery: the divergence from the dense model and the cross-entropy of the text, weighted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from msp.errors import UsageError
from msp.evidence.evaluate import Sums
from msp.evidence.head import Output, Piece


@dataclass(frozen=True)
class LossWeights:
    """The weights of the two parts: ``kl * KL(dense || model) + cross_entropy * CE``, at temperature 1.

    The defaults are those of AST (Adaptive Sparse Trainer, AAAI 2025) without its loss of hidden states.

    Raises:
        UsageError: a weight is negative or not finite, or both are 0.
    """

    kl: float = 2 / 3
    cross_entropy: float = 1 / 3

    def __post_init__(self) -> None:
        for weight in (self.kl, self.cross_entropy):
            if not 0 <= weight < math.inf:
                raise UsageError(f"a loss weight of {weight} is not a finite number from 0")
        if not self.kl + self.cross_entropy:
            raise UsageError("both loss weights are 0: then there is nothing to learn")

    @classmethod
    def of_share(cls, kl: float) -> LossWeights:
        """The weights ``kl`` and ``1 - kl``.

        Raises:
            UsageError: ``kl`` is outside [0, 1].
        """
        if not 0 <= kl <= 1:
            raise UsageError(f"a KL weight of {kl} is outside [0, 1]")
        return cls(kl, 1 - kl)

    def of(self, sums: Sums) -> float:
        """The loss of a model with these ``sums``, in nats per predicted token."""
        return (self.kl * sums.divergence + self.cross_entropy * sums.loss) / sums.predicted


def distillation_loss(
    student: Output, teacher: Output | None, tokens: Tensor, weights: LossWeights | None = None
) -> Tensor:
    """The weighted loss of ``student``, fp32 scalar in nats per predicted token, with a gradient.

    The divergence covers the full vocabulary. With a large vocabulary, both outputs hold hidden states. The logits of
    one piece at a time are then in memory, and the backward computes them again.

    Args:
        student: the output of the model that is trained.
        teacher: the output of the dense model on the same tokens; None if the weight of the divergence is 0.
        tokens: int64 ``[B, T]``; each window predicts its tokens 1 ... T-1.

    Raises:
        ValueError: the outputs have different vocabularies, or there is no teacher and the divergence has a weight.
    """
    weights = LossWeights() if weights is None else weights
    if weights.kl and teacher is None:
        raise ValueError("the divergence has a weight, and there is no output of the dense model")
    if teacher is not None and teacher.vocabulary != student.vocabulary:
        raise ValueError(f"the vocabularies have {student.vocabulary} and {teacher.vocabulary} words")

    def of_piece(states: Tensor, piece: Piece) -> Tensor:
        log_probs = Output(states, student.vocabulary, student.head).log_probabilities(piece)
        return _summed(log_probs, teacher, tokens, piece, weights)

    total = student.states.new_zeros((), dtype=torch.float32)
    for piece in student.pieces():
        if student.head is None:
            total = total + of_piece(student.states, piece)
        else:
            total = total + checkpoint(of_piece, student.states, piece, use_reentrant=False)
    return total / tokens[:, 1:].numel()


def _summed(log_probs: Tensor, teacher: Output | None, tokens: Tensor, piece: Piece, weights: LossWeights) -> Tensor:
    """The weighted loss of a piece, summed over its tokens; ``log_probs [b, t, V]``."""
    windows, positions = piece
    loss = log_probs.new_zeros(())
    if weights.cross_entropy:
        following = tokens[windows, positions.start + 1 : positions.stop + 1].to(log_probs.device)
        loss = loss - weights.cross_entropy * log_probs.gather(-1, following[..., None]).sum()
    if weights.kl:
        assert teacher is not None
        with torch.no_grad():
            dense = teacher.log_probabilities(piece).to(log_probs.device)
        loss = loss + weights.kl * kl_div(log_probs, dense, reduction="sum", log_target=True)
    return loss
