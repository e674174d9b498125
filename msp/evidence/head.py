"""The predictions of a causal LM, computed for a few tokens at a time.

Logits have tokens x vocabulary values; the hidden states that enter the output head have tokens x hidden size. With a
large vocabulary a forward therefore ends before the head, and the head computes the logits of a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msp.models.structure import device_of

# A vocabulary with at least this many words is large. The logits of a smaller one are computed whole.
LARGE_VOCABULARY = 16_384

# The bytes of fp32 logits that are computed at a time.
PIECE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}

# The number of tokens in the forward that tests whether the logits are the output of the head.
PROBE_TOKENS = 8

Piece = tuple[slice, slice]
"""A range of windows of a batch, and a range of their positions; the last position is in no range."""


@dataclass(frozen=True)
class Output:
    """The result of a forward on ``[B, T]`` tokens.

    Attributes:
        states: the hidden states ``[B, T, H]`` that enter ``head``, or the logits ``[B, T, V]`` if ``head`` is None.
        vocabulary: the size V of the vocabulary.
        head: the output head of the model, or None.
    """

    states: Tensor
    vocabulary: int
    head: nn.Module | None = None

    @classmethod
    def of_logits(cls, logits: Tensor) -> Output:
        return cls(logits, logits.shape[-1])

    def pieces(self) -> Iterator[Piece]:
        """Cut the batch into pieces: several whole windows if they fit, or else equal parts of one window."""
        windows, predicted = self.states.shape[0], self.states.shape[1] - 1
        rows = max(1, PIECE_BYTES.get(self.states.device.type, PIECE_BYTES["cpu"]) // (4 * self.vocabulary))
        together = max(1, rows // predicted)
        length = -(-predicted // -(-predicted // rows))
        for first in range(0, windows, together):
            for start in range(0, predicted, length):
                yield slice(first, first + together), slice(start, min(start + length, predicted))

    def log_probabilities(self, piece: Piece) -> Tensor:
        """The log-probabilities, fp32 ``[b, t, V]``, of the token that follows each position.

        They are computed in the precision of the head, even if autocast lowers the precision of other products.
        """
        if self.head is None:
            logits = self.states[piece]
        else:
            device = device_of(self.head)
            with torch.autocast(device.type, enabled=False):
                logits = self.head(self.states[piece].to(device))
        return logits.float().log_softmax(-1)


def outputs(model: Any, batches: Sequence[Tensor]) -> Iterator[Output]:
    """The output of ``model`` on each of ``batches``, int64 ``[B, T]``: hidden states if its vocabulary is large."""
    device = device_of(model)
    # With a large vocabulary a few tokens run first, so that no whole batch has to make logits.
    large = model.get_input_embeddings().num_embeddings >= LARGE_VOCABULARY
    few = [tokens[:1, :PROBE_TOKENS] for tokens in batches[:1] if large]

    @torch.inference_mode()
    def forward(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
        return logits

    found = outputs_of(model, map(forward, [*few, *batches]))
    for _ in few:
        next(found)
    yield from found


class Forward:
    """Runs ``model`` on a batch; its ``Output`` has hidden states if the vocabulary is large.

    Unlike those of ``outputs``, the outputs carry gradients if the caller enables them.

    Args:
        model: the causal LM.
        tokens: int64 ``[B, T]``; its first tokens run once to find the output head.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self._model = model
        found = next(outputs(model, [tokens[:1, :PROBE_TOKENS]]))
        self._head, self._vocabulary = found.head, found.vocabulary

    def __call__(self, tokens: Tensor) -> Output:
        """The output on ``tokens``, int64 ``[B, T]``."""
        with nullcontext() if self._head is None else _left_out(self._head):
            states = self._model(input_ids=tokens.to(device_of(self._model)), use_cache=False).logits
        return Output(states, self._vocabulary, self._head)


def outputs_of(model: Any, logits: Iterable[Tensor]) -> Iterator[Output]:
    """The outputs of ``model``, as ``outputs`` yields them, from an iterable of ``logits [B, T, V]``.

    Each item runs a forward of ``model`` when it is drawn.
    """
    drawn = iter(logits)
    with _watched(model) as calls:
        first = next(drawn, None)
    if first is None:
        return
    vocabulary = first.shape[-1]
    call = _head_of(first, calls) if vocabulary >= LARGE_VOCABULARY else None
    calls.clear()  # the calls hold as many bytes as the logits
    if call is None:
        yield Output.of_logits(first)
        del first
        while (states := _next(drawn, None)) is not None:
            yield Output.of_logits(states)
        return
    del first
    head, entering = call
    del call
    yield Output(entering, vocabulary, head)
    while (states := _next(drawn, head)) is not None:
        yield Output(states, vocabulary, head)


def _next(drawn: Iterator[Tensor], head: nn.Module | None) -> Tensor | None:
    with nullcontext() if head is None else _left_out(head):
        return next(drawn, None)


@dataclass
class _Call:
    head: nn.Module
    entering: Tensor
    output: Tensor


@contextmanager
def _watched(model: Any) -> Iterator[list[_Call]]:
    """Yield a list to which every call of the output head within the context is added."""
    calls: list[_Call] = []
    head = model.get_output_embeddings()
    if head is None:
        yield calls
        return
    handle = head.register_forward_hook(lambda module, given, made: calls.append(_Call(module, given[0], made)))
    try:
        yield calls
    finally:
        handle.remove()


def _head_of(logits: Tensor, calls: Sequence[_Call]) -> tuple[nn.Module, Tensor] | None:
    """The head and its input ``[B, T, H]`` if ``logits`` are its output without a soft cap or a scale, else None."""
    if len(calls) != 1:
        return None
    call = calls[0]
    if not isinstance(call.output, Tensor) or call.output.data_ptr() != logits.data_ptr():
        return None
    if call.output.shape != logits.shape or call.entering.shape[:-1] != logits.shape[:-1]:
        return None
    # The tensor may have been changed in place: a second product of a few tokens shows it.
    with torch.inference_mode():
        again, few = call.head(call.entering[:1, :PROBE_TOKENS]), logits[:1, :PROBE_TOKENS]
    tolerance = 0.01 * float(few.float().abs().max())
    if not torch.allclose(again.float(), few.float(), rtol=0.0, atol=tolerance, equal_nan=True):
        return None
    return call.head, call.entering


@contextmanager
def _left_out(head: nn.Module) -> Iterator[None]:
    """Within the context ``head`` returns its input: a forward of its model returns hidden states and no logits."""
    before = head.__dict__.get("forward")  # a library that moves weights may have set its own forward
    head.__dict__["forward"] = _unchanged
    try:
        yield
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
