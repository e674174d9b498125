"""Streams a token set through a model one block at a time and gathers what pruners ask of a linear.

The model's own forward drives: every block is replaced by a gate, so embeddings, masks and position
encodings are made by the model itself, with whatever arguments this version of transformers passes.
Before the block under work, gates pass hidden states through; the block under work runs for real on
the hidden states kept for it in host memory; behind it the forward is cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from msp.model import Block, Linear, Structure, device_of
from msp.progress import NoProgress, Progress
from msp.pruners.base import LinearStatistics

INPUT_SUM_SQUARES = "input_sum_squares"
HESSIAN = "hessian"


class _Reached(Exception):
    """The block under work has run: nothing behind it is wanted."""


class _Gate(nn.Module):
    """Stands in for one block of the model while a ``BlockStream`` is open."""

    def __init__(self, block: nn.Module, index: int, stream: BlockStream) -> None:
        super().__init__()
        self.block = block
        self._index = index
        self._stream = [stream]  # in a list, so that nn.Module does not look at it

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (an attention type, say) before calling them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._stream[0]._at_gate(self._index, args, kwargs)


class BlockStream(AbstractContextManager["BlockStream"]):
    """The hidden states of a token set in front of one block after another.

    Args:
        model: a causal LM; only the block under work needs to be on ``device``.
        structure: its blocks, from ``find_structure``.
        windows: int64 ``[S, T]`` token ids.
        batch_size: sequences per forward.
        device: where blocks run; hidden states wait in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        windows: torch.Tensor,
        *,
        batch_size: int = 8,
        device: str | torch.device | None = None,
    ) -> None:
        self._model = model
        self._structure = structure
        self._batches = list(torch.split(windows, batch_size))
        self._device = torch.device(device) if device is not None else device_of(model)
        self._hidden: list[torch.Tensor | None] = [None] * len(self._batches)
        self._wrap: list[Callable[[Any], Any]] = []
        self._active = 0
        self._batch = 0
        self._output: torch.Tensor | None = None

    def __enter__(self) -> BlockStream:
        for block in self._structure.blocks:
            self._model.set_submodule(block.name, _Gate(block.module, block.index, self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._structure.blocks:
            self._model.set_submodule(block.name, block.module)

    def run(self, index: int, *, advance: bool) -> Iterator[None]:
        """Run every batch through block ``index``, one per item drawn; keep the outputs if ``advance``.

        Blocks must be advanced in order: block ``index`` reads what ``index - 1`` left.
        """
        self._active = index
        for batch, tokens in enumerate(self._batches):
            self._batch = batch
            try:
                with torch.no_grad():
                    self._model(input_ids=tokens.to(device_of(self._model)), use_cache=False)
            except _Reached:
                pass
            if advance:
                assert self._output is not None
                self._hidden[self._batch] = self._output.to("cpu")
            self._output = None
            yield

    def __len__(self) -> int:
        return len(self._batches)

    def _at_gate(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index < self._active:
            return self._wrap[index](hidden)
        kept = self._hidden[self._batch] if index else hidden
        assert kept is not None, f"block {index} runs before block {index - 1}"
        args, kwargs = tree_map(self._to_device, (args, kwargs))
        kept = kept.to(self._device)
        if args:
            args = (kept, *args[1:])
        else:
            kwargs["hidden_states"] = kept
        output = self._structure.blocks[index].module(*args, **kwargs)
        if len(self._wrap) == index:
            self._wrap.append(_wrapper_like(output))
        self._output = output[0] if isinstance(output, tuple) else output
        raise _Reached

    def _to_device(self, leaf: Any) -> Any:
        return leaf.to(self._device) if isinstance(leaf, torch.Tensor) else leaf


def _wrapper_like(output: Any) -> Callable[[Any], Any]:
    """Gives hidden states the form in which a block returns them: alone, or first of a tuple."""
    if isinstance(output, tuple):
        rest = (None,) * (len(output) - 1)
        return lambda hidden: (hidden, *rest)
    return lambda hidden: hidden


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
    home = device_of(model)
    target = torch.device(device) if device is not None else home
    progress = progress or NoProgress()
    runs = len(structure.blocks) * (2 if sequential else 1)
    stream = BlockStream(model, structure, windows, batch_size=batch_size, device=target)
    with stream, progress.stage(label, runs * len(stream)) as advance:
        done = 0
        for block in structure.blocks:
            block.module.to(target)
            wanted = [linear for linear in block.linears if only is None or linear.name in only]
            with gather(wanted, needs) as statistics:
                for _ in stream.run(block.index, advance=not sequential):
                    advance(done := done + 1)
            yield block, statistics
            if sequential:
                for _ in stream.run(block.index, advance=True):
                    advance(done := done + 1)
            block.module.to(home)
