"""What a causal LM predicts, a few tokens at a time.

Logits take tokens x vocabulary, the hidden states that enter the output head tokens x hidden size. With a large
vocabulary forwards therefore end in front of the head, and the head makes logits of a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msp.model import device_of

# Vocabularies of so many words are large. In a smaller one the head is a larger part of each product of few tokens.
LARGE_VOCABULARY = 16_384

# Logits of so many bytes, in fp32, are made at a time.
PIECE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}

# Tokens of the forward that shows whether logits are the output of the head.
PROBE_TOKENS = 8

Piece = tuple[slice, slice]
"""Some windows of a batch, and some of their positions but the last one."""


@dataclass(frozen=True)
class Output:
    """What a forward gives on ``[B, T]`` tokens.

    Attributes:
        states: ``[B, T, H]``, the hidden states that enter ``head``; without a head the logits ``[B, T, V]``.
        vocabulary: V.
    """

    states: Tensor
    vocabulary: int
    head: nn.Module | None = None

    @classmethod
    def of_logits(cls, logits: Tensor) -> Output:
        return cls(logits, logits.shape[-1])

    def pieces(self) -> Iterator[Piece]:
        """Cuts the batch: whole windows where several fit, or parts of one window of about equal length."""
        windows, predicted = self.states.shape[0], self.states.shape[1] - 1
        rows = max(1, PIECE_BYTES.get(self.states.device.type, PIECE_BYTES["cpu"]) // (4 * self.vocabulary))
        together = max(1, rows // predicted)
        length = -(-predicted // -(-predicted // rows))
        for first in range(0, windows, together):
            for start in range(0, predicted, length):
                yield slice(first, first + together), slice(start, min(start + length, predicted))

    def log_probabilities(self, piece: Piece) -> Tensor:
        """fp32 ``[b, t, V]``, of what follows each of the positions.

        They are computed in the precision of the head, also where autocast lowers that of other products.
        """
        if self.head is None:
            logits = self.states[piece]
        else:
            device = device_of(self.head)
            with torch.autocast(device.type, enabled=False):
                logits = self.head(self.states[piece].to(device))
        return logits.float().log_softmax(-1)


def outputs(model: Any, batches: Sequence[Tensor]) -> Iterator[Output]:
    """What ``model`` gives on each of ``batches``, int64 ``[B, T]``: hidden states if its vocabulary is large."""
    device = device_of(model)
    # With a large vocabulary a few tokens come first, so that not even one whole batch has to give logits.
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


def outputs_of(model: Any, logits: Iterable[Tensor]) -> Iterator[Output]:
    """The same from ``logits [B, T, V]``, which come one by one from forwards of ``model`` when they are drawn."""
    drawn = iter(logits)
    with _watched(model) as calls:
        first = next(drawn, None)
    if first is None:
        return
    vocabulary = first.shape[-1]
    call = _head_of(first, calls) if vocabulary >= LARGE_VOCABULARY else None
    calls.clear()  # they hold as much as the logits
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
    """Yields a list to which every call of the output head within the context is added."""
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
    """The head and its input ``[B, T, H]`` if ``logits`` are its output and nothing more, no soft cap and no scale."""
    if len(calls) != 1:
        return None
    call = calls[0]
    if not isinstance(call.output, Tensor) or call.output.data_ptr() != logits.data_ptr():
        return None
    if call.output.shape != logits.shape or call.entering.shape[:-1] != logits.shape[:-1]:
        return None
    # The same tensor may still have been changed in place: another look at a few tokens shows it.
    with torch.inference_mode():
        again, few = call.head(call.entering[:1, :PROBE_TOKENS]), logits[:1, :PROBE_TOKENS]
    tolerance = 0.01 * float(few.float().abs().max())
    if not torch.allclose(again.float(), few.float(), rtol=0.0, atol=tolerance, equal_nan=True):
        return None
    return call.head, call.entering


@contextmanager
def _left_out(head: nn.Module) -> Iterator[None]:
    """Within the context ``head`` returns its input: forwards of its model give hidden states in place of logits."""
    before = head.__dict__.get("forward")  # a library that moves weights about may have put its own there
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
