"""Perplexity and KL divergence to the dense model, over non-overlapping windows of tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from msp.base.finite import check_figures
from msp.base.host_memory import give_back
from msp.base.progress import NoProgress, Progress
from msp.evidence.head import Output, Piece, outputs, outputs_of
from msp.models.structure import device_of
from msp.ops._sums import ordered_sum

# Probabilities of the dense model are kept in fp32 up to this many bytes, and in fp16 above. In fp16 they are scaled so
# that only probabilities below 1e-12 become zero; the rounding then moves the KL by less than 1e-4.
FULL_PRECISION_BYTES = 2 << 30
HALF_PRECISION_SCALE = 2.0**15


@dataclass(frozen=True)
class Quality:
    """The quality of a model on a token set. ``kl`` is the mean KL(dense || model) per token, in nats."""

    perplexity: float
    kl: float
    tokens: int


@dataclass
class Sums:
    """Loss and divergence summed over the ``predicted`` tokens, in nats; ``tokens`` counts the forwarded tokens."""

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
    """Measures models on ``windows``, int64 ``[S, T]``, with ``batch_size`` sequences at a time."""

    def __init__(self, windows: Tensor, batch_size: int) -> None:
        self.windows = windows
        self.batch_size = batch_size

    @property
    def batches(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def tokens(self, batch: int) -> Tensor:
        """int64 ``[B, T]``: the windows of a batch."""
        return self.windows[batch * self.batch_size : (batch + 1) * self.batch_size]

    def sums(self, model: Any, batches: Iterable[int]) -> Sums:
        """The sum of the ``compare`` results of ``model`` over ``batches``, given by their numbers."""
        return summed(self._each(model, list(batches)))

    def total(self, model: Any, *, progress: Progress | None = None, label: str = "Evaluating") -> Sums:
        """The ``sums`` of ``model`` over all batches."""
        total = Sums()
        with (progress or NoProgress()).stage(label, self.batches) as advance:
            for batch, sums in enumerate(self._each(model, range(self.batches))):
                total += sums
                advance(batch + 1)
        return total

    def _each(self, model: Any, batches: Sequence[int]) -> Iterator[Sums]:
        device = device_of(model)
        for batch in batches:
            with torch.inference_mode():
                sums = self.compare(batch, model(input_ids=self.tokens(batch).to(device), use_cache=False).logits)
            yield sums

    @abstractmethod
    def compare(self, batch: int, logits: Tensor) -> Sums:
        """The sums of a model that returns ``logits [B, T, V]`` for the batch with this number."""


class DenseReference(Reference):
    """The predictions of the dense model on a token set, kept in host memory; candidates are compared with them.

    With a large vocabulary (``msp.evidence.head.LARGE_VOCABULARY``) the object keeps the hidden states that enter the
    output head, and the head itself, which must not change. Each comparison then computes the predictions again. With a
    small vocabulary, or if a soft cap or a scale follows the head, the object keeps the probabilities.

    Args:
        model: the dense causal LM.
        windows: int64 ``[S, T]``; each window predicts its tokens 1 ... T-1.
        batch_size: sequences per forward.
        logits: the dense model's logits ``[B, T, V]`` for every batch. They are drawn one by one, and each item runs
            the model when it is drawn. None runs plain forwards of the model.

    Raises:
        MspError: the perplexity is not finite; the message names the block whose output is not finite.

    Attributes:
        quality: the dense model's own perplexity (its KL is 0).
        windows: the windows as they were given.
    """

    def __init__(
        self,
        model: Any,
        windows: Tensor,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
        label: str = "Dense predictions",
        logits: Iterable[Tensor] | None = None,
    ) -> None:
        super().__init__(windows, batch_size)
        self._kept: list[_Hidden | _Probabilities] = []
        found = outputs(model, torch.split(windows, batch_size)) if logits is None else outputs_of(model, logits)
        loss, predicted = 0.0, 0
        with (progress or NoProgress()).stage(label, self.batches) as advance:
            for batch, output in enumerate(found):
                kept = _Hidden(output) if output.head is not None else _Probabilities(output, windows[:, 1:].numel())
                self._kept.append(kept)
                with torch.inference_mode():
                    for piece in output.pieces():
                        log_probs = output.log_probabilities(piece)
                        loss += _loss(log_probs, self.tokens(batch), piece)
                        kept.add(piece, log_probs)
                predicted += self.tokens(batch)[:, 1:].numel()
                advance(batch + 1)
        self.quality = Quality(_perplexity(loss, predicted), 0.0, predicted)
        give_back()  # the memory of activations, and of the logits that became probabilities
        dense = {"perplexity of the dense model": self.quality.perplexity}
        check_figures(dense, model, windows[:batch_size], streamed=logits is not None)

    def _each(self, model: Any, batches: Sequence[int]) -> Iterator[Sums]:
        found = outputs(model, [self.tokens(batch) for batch in batches])
        for batch, output in zip(batches, found, strict=True):
            yield self._compare(batch, output)

    def compare(self, batch: int, logits: Tensor) -> Sums:
        """The summed loss and KL divergence of a model that returns ``logits [B, T, V]`` for the batch."""
        return self._compare(batch, Output.of_logits(logits))

    @torch.inference_mode()
    def _compare(self, batch: int, output: Output) -> Sums:
        tokens, kept = self.tokens(batch), self._kept[batch]
        sums = Sums(0.0, kept.plogp, tokens[:, 1:].numel(), tokens.numel())
        for piece in output.pieces():
            log_probs = output.log_probabilities(piece)
            sums.loss += _loss(log_probs, tokens, piece)
            sums.divergence += kept.divergence(piece, log_probs)
        return sums

    def measure(self, model: Any, *, progress: Progress | None = None, label: str = "Evaluating") -> Quality:
        """The perplexity of ``model`` on all windows, and its KL to the dense model."""
        return self.quality_of(self.total(model, progress=progress, label=label))

    def quality_of(self, total: Sums) -> Quality:
        """The quality of a model whose sums over all windows are ``total``."""
        return Quality(_perplexity(total.loss, total.predicted), total.divergence / total.predicted, total.predicted)


class _Hidden:
    """A batch of hidden states of the dense model, in host memory; each comparison computes predictions from them."""

    plogp = 0.0

    def __init__(self, output: Output) -> None:
        self._output = replace(output, states=output.states.cpu())

    def add(self, piece: Piece, log_probs: Tensor) -> None:
        pass

    def divergence(self, piece: Piece, log_probs: Tensor) -> float:
        """The sum of p (log p - log q); ``log_probs`` holds log q and is overwritten."""
        dense = self._output.log_probabilities(piece).to(log_probs.device)
        weighted = log_probs.neg_().add_(dense).mul_(dense.exp_())
        return float(ordered_sum(weighted.sum(-1).double()))


class _Probabilities:
    """A batch of probabilities p of the dense model, in host memory, times a scale; ``plogp`` is the sum of p log p."""

    def __init__(self, output: Output, predicted: int) -> None:
        windows, length, vocabulary = output.states.shape
        full = predicted * vocabulary * 4 <= FULL_PRECISION_BYTES
        self._scale = 1.0 if full else HALF_PRECISION_SCALE
        self._probs = torch.empty(windows, length - 1, vocabulary, dtype=torch.float32 if full else torch.float16)
        self.plogp = 0.0

    def add(self, piece: Piece, log_probs: Tensor) -> None:
        """Keep the probabilities of ``piece``; ``log_probs`` holds log p and is overwritten."""
        self._probs[piece] = log_probs.exp().mul_(self._scale).to("cpu", self._probs.dtype)
        self.plogp -= self.divergence(piece, log_probs)

    def divergence(self, piece: Piece, log_probs: Tensor) -> float:
        """Minus the sum of p log q; ``log_probs`` holds log q and is overwritten."""
        weighted = log_probs.mul_(self._probs[piece].to(log_probs.device, torch.float32))
        return -float(ordered_sum(weighted.sum(-1).double())) / self._scale


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor, *, batch_size: int = 8, progress: Progress | None = None) -> Quality:
    """The perplexity of ``model`` on ``windows``, int64 ``[S, T]``; ``kl`` is NaN. No predictions are kept.

    Raises:
        MspError: the perplexity is not finite; the message names the block whose output is not finite.
    """
    batches = torch.split(windows, batch_size)
    loss = 0.0
    with (progress or NoProgress()).stage("Evaluating", len(batches)) as advance:
        for done, (tokens, output) in enumerate(zip(batches, outputs(model, batches), strict=True), start=1):
            for piece in output.pieces():
                loss += _loss(output.log_probabilities(piece), tokens, piece)
            advance(done)
    predicted = windows[:, 1:].numel()
    quality = Quality(_perplexity(loss, predicted), math.nan, predicted)
    check_figures({"perplexity": quality.perplexity}, model, windows[:batch_size])
    return quality


def _loss(log_probs: Tensor, tokens: Tensor, piece: Piece) -> float:
    """The summed negative log-likelihood of the ``tokens`` [B, T] that follow the positions of ``piece``."""
    windows, positions = piece
    followers = tokens[windows, positions.start + 1 : positions.stop + 1].to(log_probs.device)
    return -float(ordered_sum(log_probs.gather(-1, followers[..., None]).double()))


def _perplexity(loss: float, predicted: int) -> float:
    mean = loss / predicted
    return math.exp(mean) if mean < 700 else math.inf
