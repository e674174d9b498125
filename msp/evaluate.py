"""Perplexity and KL divergence to the dense model, over non-overlapping windows of tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from msp.finite import check_figures
from msp.head import Output, Piece, outputs, outputs_of
from msp.host_memory import give_back
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
        """What ``compare`` says of ``model`` on ``batches``, by their numbers, summed."""
        return summed(self._each(model, list(batches)))

    def total(self, model: Any, *, progress: Progress | None = None, label: str = "Evaluating") -> Sums:
        """``sums`` over all batches."""
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
        """Of a model that has ``logits [B, T, V]`` for a batch."""


class DenseReference(Reference):
    """What the dense model predicts on a token set, kept on the host to measure candidates against.

    With a large vocabulary (``msp.head.LARGE_VOCABULARY``) the hidden states that enter the output head are kept, and
    the head itself, which must stay as it is: its predictions are computed anew for each comparison. Otherwise, and
    where a soft cap or a scale follows the head, the probabilities are kept.

    Args:
        model: the dense causal LM.
        windows: int64 ``[S, T]``; each window predicts its tokens 1 ... T-1.
        batch_size: sequences per forward.
        logits: ``[B, T, V]`` of the dense model for every batch, if not from plain forwards of it: drawn one after
            the other, each from a run of the model at that moment.

    Raises:
        MspError: its perplexity is not finite; names the block whose output is not.

    Attributes:
        quality: the dense model's own perplexity (its KL is 0).
        windows: as given.
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
        give_back()  # activations, and logits before they became probabilities
        dense = {"perplexity of the dense model": self.quality.perplexity}
        check_figures(dense, model, windows[:batch_size], streamed=logits is not None)

    def _each(self, model: Any, batches: Sequence[int]) -> Iterator[Sums]:
        found = outputs(model, [self.tokens(batch) for batch in batches])
        for batch, output in zip(batches, found, strict=True):
            yield self._compare(batch, output)

    def compare(self, batch: int, logits: Tensor) -> Sums:
        """Summed loss and KL divergence of a model that has ``logits [B, T, V]`` for a batch."""
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
        """Perplexity of ``model`` on all windows, and its KL from the dense one."""
        return self.quality_of(self.total(model, progress=progress, label=label))

    def quality_of(self, total: Sums) -> Quality:
        """Of a model that has ``total`` on all windows."""
        return Quality(_perplexity(total.loss, total.predicted), total.divergence / total.predicted, total.predicted)


class _Hidden:
    """A batch of hidden states of the dense model, in host memory; predictions are computed from them when needed."""

    plogp = 0.0

    def __init__(self, output: Output) -> None:
        self._output = replace(output, states=output.states.cpu())

    def add(self, piece: Piece, log_probs: Tensor) -> None:
        pass

    def divergence(self, piece: Piece, log_probs: Tensor) -> float:
        """Sum of p (log p - log q); ``log_probs``, log q, is overwritten."""
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
        """Keep the probabilities of ``piece``; ``log_probs``, log p, is overwritten."""
        self._probs[piece] = log_probs.exp().mul_(self._scale).to("cpu", self._probs.dtype)
        self.plogp -= self.divergence(piece, log_probs)

    def divergence(self, piece: Piece, log_probs: Tensor) -> float:
        """Minus the sum of p log q; ``log_probs``, log q, is overwritten."""
        weighted = log_probs.mul_(self._probs[piece].to(log_probs.device, torch.float32))
        return -float(ordered_sum(weighted.sum(-1).double())) / self._scale


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor, *, batch_size: int = 8, progress: Progress | None = None) -> Quality:
    """Perplexity alone, keeping nothing; ``kl`` is NaN.

    Raises:
        MspError: it is not finite; names the block whose output is not.
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
    """Summed negative log-likelihood of the ``tokens`` [B, T] that follow the positions of ``piece``."""
    windows, positions = piece
    followers = tokens[windows, positions.start + 1 : positions.stop + 1].to(log_probs.device)
    return -float(ordered_sum(log_probs.gather(-1, followers[..., None]).double()))


def _perplexity(loss: float, predicted: int) -> float:
    mean = loss / predicted
    return math.exp(mean) if mean < 700 else math.inf
