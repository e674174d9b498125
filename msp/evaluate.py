"""Perplexity and KL divergence to the dense model, over non-overlapping windows of tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from msp.model import device_of
from msp.ops._sums import ordered_sum
from msp.progress import NoProgress, Progress

# Probabilities of the dense model are kept in fp32 up to this many bytes and in fp16 beyond, scaled so that
# only those below 1e-12 vanish: the rounding then moves the KL by less than 1e-4.
FULL_PRECISION_BYTES = 2 << 30
HALF_PRECISION_SCALE = 2.0**15


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a token set. ``kl`` is the mean KL(dense || model) per token, in nats."""

    perplexity: float
    kl: float
    tokens: int


@dataclass
class Sums:
    """Loss and divergence summed over predicted tokens, in nats; ``tokens`` counts what was forwarded."""

    loss: float = 0.0
    divergence: float = 0.0
    predicted: int = 0
    tokens: int = 0

    def __iadd__(self, other: Sums) -> Sums:
        self.loss += other.loss
        self.divergence += other.divergence
        self.predicted += other.predicted
        self.tokens += other.tokens
        return self


def summed(parts: Iterable[Sums]) -> Sums:
    """The sum of ``parts``, added up in their order."""
    total = Sums()
    for part in parts:
        total += part
    return total


class Reference(ABC):
    """What models are measured against on ``windows``, int64 ``[S, T]``, ``batch_size`` sequences at a time."""

    def __init__(self, windows: torch.Tensor, batch_size: int) -> None:
        self.windows = windows
        self.batch_size = batch_size

    @property
    def batches(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def tokens(self, batch: int) -> torch.Tensor:
        """int64 ``[B, T]``: the windows of a batch."""
        return self.windows[batch * self.batch_size : (batch + 1) * self.batch_size]

    @torch.inference_mode()
    def sums(self, model: Any, batches: Iterable[int]) -> Sums:
        """What ``compare`` says of ``model`` on ``batches``, by their numbers, summed."""
        device = device_of(model)
        return summed(
            self.compare(batch, model(input_ids=self.tokens(batch).to(device), use_cache=False).logits)
            for batch in batches
        )

    def total(self, model: Any, *, progress: Progress | None = None, label: str = "Evaluating") -> Sums:
        """``sums`` over all batches."""
        total = Sums()
        with (progress or NoProgress()).stage(label, self.batches) as advance:
            for batch in range(self.batches):
                total += self.sums(model, [batch])
                advance(batch + 1)
        return total

    @abstractmethod
    def compare(self, batch: int, logits: torch.Tensor) -> Sums:
        """Of a model that has ``logits [B, T, V]`` for a batch."""


class DenseReference(Reference):
    """What the dense model predicts on a token set, kept on the host to measure candidates against.

    Args:
        model: the dense causal LM.
        windows: int64 ``[S, T]``; each window predicts its tokens 1 ... T-1.
        batch_size: sequences per forward.
        logits: ``[B, T, V]`` of the dense model for every batch, where they come from somewhere else.

    Attributes:
        quality: the dense model's own perplexity (its KL is 0).
        windows: as given.
    """

    def __init__(
        self,
        model: Any,
        windows: torch.Tensor,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
        label: str = "Dense predictions",
        logits: Iterable[torch.Tensor] | None = None,
    ) -> None:
        super().__init__(windows, batch_size)
        # Per batch: probabilities p times a scale, and the sum of p log p.
        self._kept: list[tuple[torch.Tensor, float]] = []
        self._scale = 1.0
        loss, predicted, dtype = 0.0, 0, torch.float32
        batches = torch.split(windows, batch_size)
        with (progress or NoProgress()).stage(label, len(batches)) as advance:
            for index, (tokens, log_probs) in enumerate(_predictions(model, windows, batch_size, logits)):
                if index == 0:
                    total = windows.shape[0] * (windows.shape[1] - 1) * log_probs.shape[-1] * 4
                    if total > FULL_PRECISION_BYTES:
                        dtype, self._scale = torch.float16, HALF_PRECISION_SCALE
                loss += _loss(log_probs, tokens)
                predicted += log_probs.shape[0] * log_probs.shape[1]
                probs = (log_probs.exp() * self._scale).to(dtype)
                self._kept.append((probs.cpu(), self._expected(probs, log_probs)))
                advance(index + 1)
        self.quality = Quality(_perplexity(loss, predicted), 0.0, predicted)

    def compare(self, batch: int, logits: torch.Tensor) -> Sums:
        """Summed loss and KL divergence of a model that has ``logits [B, T, V]`` for a batch."""
        log_probs = _log_probabilities(logits)
        del logits  # as large; where nobody else holds them, their memory is free for the product below
        probs, plogp = self._kept[batch]
        tokens = self.tokens(batch).to(log_probs.device)
        loss, predicted = _loss(log_probs, tokens), log_probs.shape[0] * log_probs.shape[1]
        return Sums(loss, plogp - self._expected(probs, log_probs), predicted, tokens.numel())

    def _expected(self, probs: torch.Tensor, log_probs: torch.Tensor) -> float:
        """Sum of p times ``log_probs``, which is overwritten."""
        weighted = log_probs.mul_(probs.to(log_probs.device, torch.float32))
        return float(ordered_sum(weighted.sum(-1).double())) / self._scale

    def measure(self, model: Any, *, progress: Progress | None = None, label: str = "Evaluating") -> Quality:
        """Perplexity of ``model`` on all windows, and its KL from the dense one."""
        return self.quality_of(self.total(model, progress=progress, label=label))

    def quality_of(self, total: Sums) -> Quality:
        """Of a model that has ``total`` on all windows."""
        return Quality(_perplexity(total.loss, total.predicted), total.divergence / total.predicted, total.predicted)


def perplexity(model: Any, windows: torch.Tensor, *, batch_size: int = 8, progress: Progress | None = None) -> Quality:
    """Perplexity alone, keeping nothing; ``kl`` is NaN."""
    loss, predicted = 0.0, 0
    with (progress or NoProgress()).stage("Evaluating", len(torch.split(windows, batch_size))) as advance:
        for index, (tokens, log_probs) in enumerate(_predictions(model, windows, batch_size)):
            loss += _loss(log_probs, tokens)
            predicted += log_probs.shape[0] * log_probs.shape[1]
            advance(index + 1)
    return Quality(_perplexity(loss, predicted), math.nan, predicted)


def _predictions(
    model: Any, windows: torch.Tensor, batch_size: int, logits: Iterable[torch.Tensor] | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(tokens [B, T], fp32 log-probabilities [B, T-1, V])`` batch by batch."""
    device = device_of(model)
    batches = torch.split(windows, batch_size)
    if logits is not None:
        for tokens, predicted in zip(batches, logits, strict=True):
            yield tokens.to(predicted.device), _log_probabilities(predicted)
        return
    for tokens in batches:
        tokens = tokens.to(device)
        with torch.inference_mode():
            yield tokens, _log_probabilities(model(input_ids=tokens, use_cache=False).logits)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """fp32 ``[B, T-1, V]``, of what follows each token but the last, from ``logits [B, T, V]``."""
    return functional.log_softmax(logits[:, :-1].float(), dim=-1)


def _loss(log_probs: torch.Tensor, tokens: torch.Tensor) -> float:
    return -float(ordered_sum(log_probs.gather(-1, tokens[:, 1:, None]).double()))


def _perplexity(loss: float, predicted: int) -> float:
    mean = loss / predicted
    return math.exp(mean) if mean < 700 else math.inf
