"""Streams a token set through a model one block at a time, and collects the input statistics that pruners need."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import count
from typing import Any

import torch
from torch import nn

from msp.base.finite import is_finite
from msp.base.progress import NoProgress, Progress
from msp.errors import MspError
from msp.models.gates import GatedModel, State
from msp.models.structure import Block, Linear, Structure, device_of
from msp.pruners.base import LinearStatistics

INPUT_SUM_SQUARES = "input_sum_squares"
HESSIAN = "hessian"


class BlockStream:
    """The states of a token set before the current block, in host memory.

    Args:
        gates: the model; its context must be entered while blocks run.
        windows: int64 ``[S, T]`` token ids.
        batch_size: sequences per forward.
    """

    def __init__(self, gates: GatedModel, windows: torch.Tensor, *, batch_size: int = 8) -> None:
        self._gates = gates
        self._batches = list(torch.split(windows, batch_size))
        self._states: list[State | None] = [None] * len(self._batches)

    def copy(self) -> BlockStream:
        """A second stream before the same block."""
        other = copy(self)
        other._states = list(self._states)
        return other

    def run(self, index: int, *, advance: bool) -> Iterator[None]:
        """Run the batches through block ``index``, one for each item drawn; keep the outputs if ``advance``.

        The blocks must be advanced in order, because block ``index`` reads the outputs of block ``index - 1``.
        """
        for batch, tokens in enumerate(self._batches):
            state = self._states[batch]
            assert state is not None or index == 0, f"block {index} runs before block {index - 1}"
            with torch.no_grad():
                output = self._gates.block(index, tokens, state)
            if advance:
                self._states[batch] = output.to("cpu")
            yield

    def pass_through(self, index: int) -> None:
        """Run every batch through block ``index`` and keep the outputs."""
        for _ in self.run(index, advance=True):
            pass

    def logits(self) -> Iterator[torch.Tensor]:
        """The logits ``[B, T, V]`` of every batch, after all blocks have been advanced."""
        for batch, tokens in enumerate(self._batches):
            state, self._states[batch] = self._states[batch], None
            assert state is not None, "the head runs before the blocks"
            with torch.no_grad():
                logits = self._gates.logits(tokens, state)
            yield logits

    def __len__(self) -> int:
        return len(self._batches)


@contextmanager
def gather(linears: Sequence[Linear], needs: frozenset[str]) -> Iterator[dict[str, LinearStatistics]]:
    """Within the context, forwards of ``linears`` add to the statistics that are yielded.

    ``needs`` may hold ``"input_sum_squares"`` (fp32 ``[K]``, sum over tokens of x^2) and ``"hessian"``
    (fp32 ``[K, K]``, sum over tokens of x x^T). If a weight has several places in the model, the sum is over all of
    them.

    Raises:
        MspError: a sum is not finite when the context ends; the message names the linear.
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

    handles = []
    for linear in linears:
        hook = hook_for(linear)
        handles += [module.register_forward_pre_hook(hook) for module in linear.modules]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    for name, entry in statistics.items():
        for tensor in (entry.input_sum_squares, entry.hessian):
            if tensor is not None and not is_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise MspError(f"{name}: {bad} of {tensor.numel()} sums over its inputs are NaN or infinite")


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
    whole: bool = False,
    progress: Progress | None = None,
    label: str = "Calibrating",
) -> Iterator[tuple[Block, Mapping[str, LinearStatistics]]]:
    """Yield each block, on ``device``, with the input statistics of its linears.

    Memory beyond the model: one block, its statistics, and one state per token of ``windows`` in host memory.

    A weight that later blocks share has statistics over all its places. They are measured when its first block is
    yielded, and the blocks up to its last place run once more for that.

    Args:
        model, structure: the causal LM and its blocks.
        windows: int64 ``[S, T]`` token ids.
        needs: the statistics to collect, see ``gather``.
        sequential: run each block again after the caller has changed it, so that later blocks get the outputs of the
            pruned blocks. Without it, one run collects the statistics and gives the outputs.
        only: the names of the linears to collect statistics of; None for all.
        batch_size: sequences per forward.
        device: the device that blocks run on.
        whole: run the whole model for each block, on the model's own device, because its blocks do not run alone.
            Without ``sequential``, one forward serves all blocks. ``device`` is then ignored.
        progress, label: the progress display, and the name of the stage in it.

    Raises:
        MspError: a statistic is not finite, or a forward does not reach a block.
    """
    if whole:
        return _whole_statistics(model, structure, windows, needs, sequential, only, batch_size, progress, label)
    gates = GatedModel(model, structure, device)
    stream = BlockStream(gates, windows, batch_size=batch_size)
    return _streamed_statistics(gates, stream, needs, sequential, only, progress, label)


def _streamed_statistics(
    gates: GatedModel,
    stream: BlockStream,
    needs: frozenset[str],
    sequential: bool,
    only: Container[str] | None,
    progress: Progress | None,
    label: str,
) -> Iterator[tuple[Block, Mapping[str, LinearStatistics]]]:
    blocks = gates.structure.blocks
    wanted = {block.index: _wanted(block, only) for block in blocks}
    last = {index: max((x.last_block for x in linears), default=index) for index, linears in wanted.items()}
    # a block that shares weights with later blocks runs once for the statistics, and again for its outputs
    again = [sequential or last[block.index] > block.index for block in blocks]
    runs = sum(1 + last[block.index] - block.index + again[block.index] for block in blocks)
    with gates, (progress or NoProgress()).stage(label, runs * len(stream)) as advance:
        steps = count(1)
        for block in blocks:
            with block.on(gates.device):
                with gather(wanted[block.index], needs) as statistics:
                    ahead = stream.copy() if again[block.index] else stream
                    goes_on = last[block.index] > block.index or not again[block.index]
                    for _ in ahead.run(block.index, advance=goes_on):
                        advance(next(steps))
                    for later in blocks[block.index + 1 : last[block.index] + 1]:
                        with later.on(gates.device):
                            for _ in ahead.run(later.index, advance=True):
                                advance(next(steps))
                        block.module.to(gates.device)  # the weights that both blocks share have just left the device
                yield block, statistics
                del statistics
                if again[block.index]:
                    for _ in stream.run(block.index, advance=True):
                        advance(next(steps))


def _whole_statistics(
    model: Any,
    structure: Structure,
    windows: torch.Tensor,
    needs: frozenset[str],
    sequential: bool,
    only: Container[str] | None,
    batch_size: int,
    progress: Progress | None,
    label: str,
) -> Iterator[tuple[Block, Mapping[str, LinearStatistics]]]:
    """The statistics from one forward for all blocks or, with ``sequential``, from one forward for each block."""
    batches = torch.split(windows, batch_size)
    home = device_of(model)
    groups = [[block] for block in structure.blocks] if sequential else [list(structure.blocks)]
    with (progress or NoProgress()).stage(label, len(groups) * len(batches)) as advance:
        steps = count(1)
        for group in groups:
            with gather([linear for block in group for linear in _wanted(block, only)], needs) as statistics:
                for tokens in batches:
                    with torch.no_grad():
                        model(input_ids=tokens.to(home), use_cache=False)
                    advance(next(steps))
            for block in group:
                yield block, {linear.name: statistics[linear.name] for linear in _wanted(block, only)}


def _wanted(block: Block, only: Container[str] | None) -> list[Linear]:
    return [linear for linear in block.linears if only is None or linear.name in only]
