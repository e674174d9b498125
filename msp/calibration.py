"""Streams a token set through a model one block at a time and gathers what pruners ask of a linear."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from msp.gates import GatedModel
from msp.model import Block, Linear, Structure
from msp.progress import NoProgress, Progress
from msp.pruners.base import LinearStatistics

INPUT_SUM_SQUARES = "input_sum_squares"
HESSIAN = "hessian"


class BlockStream:
    """The hidden states of a token set in front of one block after another, waiting in host memory.

    Args:
        gates: the model, entered while blocks run.
        windows: int64 ``[S, T]`` token ids.
        batch_size: sequences per forward.
    """

    def __init__(self, gates: GatedModel, windows: torch.Tensor, *, batch_size: int = 8) -> None:
        self._gates = gates
        self._batches = list(torch.split(windows, batch_size))
        self._hidden: list[torch.Tensor | None] = [None] * len(self._batches)

    def run(self, index: int, *, advance: bool) -> Iterator[None]:
        """Run every batch through block ``index``, one per item drawn; keep the outputs if ``advance``.

        Blocks must be advanced in order: block ``index`` reads what ``index - 1`` left.
        """
        for batch, tokens in enumerate(self._batches):
            hidden = self._hidden[batch]
            assert hidden is not None or index == 0, f"block {index} runs before block {index - 1}"
            with torch.no_grad():
                output = self._gates.block(index, tokens, hidden)
            if advance:
                self._hidden[batch] = output.to("cpu")
            yield

    def pass_through(self, index: int) -> None:
        """Bring every batch behind block ``index``."""
        for _ in self.run(index, advance=True):
            pass

    def logits(self) -> Iterator[torch.Tensor]:
        """``[B, T, V]`` of every batch, when all blocks have been advanced."""
        for batch, tokens in enumerate(self._batches):
            hidden, self._hidden[batch] = self._hidden[batch], None
            assert hidden is not None, "the head runs before the blocks"
            with torch.no_grad():
                logits = self._gates.logits(tokens, hidden)
            yield logits

    def __len__(self) -> int:
        return len(self._batches)


@contextmanager
def gather(linears: Sequence[Linear], needs: frozenset[str]) -> Iterator[dict[str, LinearStatistics]]:
    """Within the context, forwards of ``linears`` add to the statistics that are yielded.

    ``needs`` may hold ``"input_sum_squares"`` (fp32 ``[K]``, sum over tokens of x^2) and ``"hessian"``
    (fp32 ``[K, K]``, sum over tokens of x x^T).
    """
    statistics = {linear.name: LinearStatistics() for linear in linears}

    def hook_for(linear: Linear) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        entry = statistics[linear.name]
        columns = linear.shape[1]
        device = linear.weight.device
        if INPUT_SUM_SQUARES in needs:
            entry.input_sum_squares = torch.zeros(columns, device=device)
        if HESSIAN in needs:
            entry.hessian = torch.zeros(columns, columns, device=device)

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].reshape(-1, columns).float()
            entry.tokens += x.shape[0]
            if entry.input_sum_squares is not None:
                entry.input_sum_squares += x.square().sum(0)
            if entry.hessian is not None:
                entry.hessian.addmm_(x.t(), x)

        return hook

    handles = [linear.module.register_forward_pre_hook(hook_for(linear)) for linear in linears]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def stream_statistics(
    model: nn.Module,
    structure: Structure,
    windows: torch.Tensor,
    needs: frozenset[str],
    *,
    sequential: bool = False,
    only: Container[str] | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    label: str = "Calibrating",
) -> Iterator[tuple[Block, Mapping[str, LinearStatistics]]]:
    """Yield each block, on ``device``, with the input statistics of its linears.

    With ``sequential`` the block runs again after the caller has changed it, so that later blocks see
    what a pruned model gives them; without, one run serves both. ``only`` names the linears to look at.
    Memory beyond the model: one block, its statistics, and one hidden state per token of ``windows`` in
    host memory.
    """
    gates = GatedModel(model, structure, device)
    stream = BlockStream(gates, windows, batch_size=batch_size)
    runs = len(structure.blocks) * (2 if sequential else 1)
    with gates, (progress or NoProgress()).stage(label, runs * len(stream)) as advance:
        done = 0
        for block in structure.blocks:
            wanted = [linear for linear in block.linears if only is None or linear.name in only]
            with block.on(gates.device):
                with gather(wanted, needs) as statistics:
                    for _ in stream.run(block.index, advance=not sequential):
                        advance(done := done + 1)
                yield block, statistics
                if sequential:
                    for _ in stream.run(block.index, advance=True):
                        advance(done := done + 1)
