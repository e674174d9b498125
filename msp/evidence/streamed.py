"""Predictions and Fisher traces of a model that has one block at a time in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from msp.base.progress import NoProgress, Progress
from msp.evidence.calibration import BlockStream
from msp.evidence.fisher import Consume, Tap, adding_to, check_windows, frozen, sequence_loss
from msp.models.gates import GatedModel
from msp.models.hidden import HiddenStates
from msp.models.structure import Structure, device_of


def streamed_logits(
    model: Any,
    structure: Structure,
    windows: Tensor,
    *,
    batch_size: int,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """``[B, T, V]`` for every batch of ``windows [S, T]``; each block is loaded once.

    Memory: a hidden state per token, in host memory.
    """
    gates = GatedModel(model, structure, device)
    stream = BlockStream(gates, windows, batch_size=batch_size)
    with gates:
        with (progress or NoProgress()).stage("Blocks", len(structure.blocks)) as advance:
            for block in structure.blocks:
                with block.on(gates.device):
                    stream.pass_through(block.index)
                advance(block.index + 1)
        yield from stream.logits()


def streamed_fisher_traces(
    model: Any,
    structure: Structure,
    windows: Tensor,
    *,
    hidden_bytes: int,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """``fisher_traces`` of all linears of the blocks, with one block loaded at a time.

    A forward keeps the hidden states before every block. The backward goes from the last block to the first and runs
    each forward again. A group has as many sequences as ``hidden_bytes`` can hold; each group loads every block twice.
    Arguments and errors are those of ``fisher_traces``.
    """
    check_windows(windows)
    sequences, tokens = windows.shape
    traces = {linear.name: 0.0 for linear in structure.linears}

    consume = adding_to(traces)
    gates = GatedModel(model, structure, device)
    depth = len(structure.blocks)
    with torch.inference_mode(False), frozen(model), gates:
        with torch.no_grad():
            size = gates.embedded(windows[:1]).nbytes * (depth + 2)
        groups = torch.split(torch.arange(sequences), max(1, hidden_bytes // size))
        with (progress or NoProgress()).stage("Fisher traces", 2 * depth * len(groups)) as advance:
            done = 0
            for group in groups:
                batch = {index: windows[index : index + 1].clone().to(device_of(model)) for index in group.tolist()}
                hidden = HiddenStates(hidden_bytes)
                for _ in chain(_forward(gates, batch, hidden), _backward(gates, batch, hidden, consume)):
                    advance(done := done + 1, held_bytes=hidden.held)
    scale = 1.0 / (sequences * (tokens - 1) ** 2)
    return {name: trace * scale for name, trace in traces.items()}


def _forward(gates: GatedModel, batch: Mapping[int, Tensor], hidden: HiddenStates) -> Iterator[None]:
    """Fill ``hidden`` at ``(depth, sequence)``, depth 0 before the first block; loads a block per item drawn."""
    with torch.no_grad():
        for index, window in batch.items():
            hidden.put((0, index), gates.embedded(window))
    for block in gates.structure.blocks:
        with block.on(gates.device), torch.no_grad():
            for index, window in batch.items():
                hidden.put((block.index + 1, index), gates.block(block.index, window, hidden.get((block.index, index))))
        yield


def _backward(gates: GatedModel, batch: Mapping[int, Tensor], hidden: HiddenStates, consume: Consume) -> Iterator[None]:
    """Replace the states by gradients, from the last to the first; loads a block per item drawn."""
    depth = len(gates.structure.blocks)
    for index, window in batch.items():
        with torch.enable_grad():
            state = hidden.pop((depth, index)).to(device_of(gates.model)).map(Tensor.requires_grad_)
            loss = sequence_loss(gates.logits(window, state), window, index)
            hidden.put((depth, index), state.replaced(torch.autograd.grad(loss, state.tensors)))
    for block in reversed(gates.structure.blocks):
        with block.on(gates.device), Tap(None, block.linears, consume) as tap, torch.enable_grad():
            for index, window in batch.items():
                entering = hidden.pop((block.index, index)).to(gates.device)
                output = gates.block(block.index, window, entering.map(_source_in(tap)))
                gradients = hidden.pop((block.index + 1, index)).to(gates.device)
                found = iter(tap.backward(output.tensors, gradients.tensors))
                hidden.put((block.index, index), entering.map(_next_of(found)))
        yield


def _source_in(tap: Tap) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tap.with_gradient(tensor) if tensor.is_floating_point() else tensor


def _next_of(gradients: Iterator[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """The gradient of each tensor: 0 if the loss does not depend on it or if it holds integers."""

    def take(tensor: Tensor) -> Tensor:
        gradient = next(gradients) if tensor.is_floating_point() else None
        return torch.zeros_like(tensor) if gradient is None else gradient

    return take
