"""Runs a model piece by piece: the embeddings, one block, or what lies behind the blocks.

The model's own forward drives: every block is replaced by a gate, so embeddings, masks and position
encodings are made by the model itself, with whatever arguments this version of transformers passes.
Gates before the piece that is wanted pass hidden states through; behind it the forward is cut short.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from msp.model import Structure, device_of

Keep = Callable[[int, Tensor], None]
"""Hears of the hidden states behind so many blocks."""


class _Reached(Exception):
    """What was wanted is there: nothing behind it is run."""


class _Gate(nn.Module):
    """Stands in for one block of the model while a ``GatedModel`` is entered."""

    def __init__(self, block: nn.Module, index: int, gates: GatedModel) -> None:
        super().__init__()
        self.block = block
        self._index = index
        self._gates = [gates]  # in a list, so that nn.Module does not look at it

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (an attention type, say) before calling them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._gates[0]._at_gate(self._index, args, kwargs)


class GatedModel(AbstractContextManager["GatedModel"]):
    """A causal LM whose pieces can be run one at a time while it is entered, as often as wanted.

    Args:
        model: only the block that runs needs to be on ``device``, and its weights to be there at all.
        structure: its blocks, from ``find_structure``.
        device: where blocks run; the rest of the model stays where it is.
    """

    def __init__(self, model: Any, structure: Structure, device: str | torch.device | None = None) -> None:
        self.model = model
        self.structure = structure
        self.device = torch.device(device) if device is not None else device_of(model)
        # How each block returns hidden states: known once it has run.
        self._wrap: list[Callable[[Any], Any]] = []
        self._active = 0
        self._entering: Tensor | None = None
        self._output: Tensor | None = None
        # Hears of what every block gives while all from the active one on are run.
        self._keep: Keep | None = None

    def __enter__(self) -> GatedModel:
        for block in self.structure.blocks:
            self.model.set_submodule(block.name, _Gate(block.module, block.index, self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self.structure.blocks:
            self.model.set_submodule(block.name, block.module)

    def embedded(self, tokens: Tensor) -> Tensor:
        """The hidden states in front of the first block."""
        return self.block(-1, tokens)

    def block(self, index: int, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The hidden states behind block ``index``.

        Args:
            tokens: int64 ``[B, T]``, from which the model makes masks and positions.
            hidden: those before the block; may be left out for the first one.
        """
        self._active, self._entering = index, None if hidden is None else hidden.to(self.device)
        with suppress(_Reached):
            self._forward(tokens)
        output, self._output = self._output, None
        assert output is not None
        return output

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """``[B, T, V]`` from the hidden states behind the last block; each block must have run before."""
        self._active, self._entering = len(self.structure.blocks), hidden.to(device_of(self.model))
        logits: Tensor = self._forward(tokens).logits
        return logits

    def resume(self, depth: int, tokens: Tensor, hidden: Tensor | None, keep: Keep) -> Tensor:
        """``[B, T, V]`` from the hidden states behind ``depth`` blocks, in one forward.

        Args:
            hidden: may be left out for ``depth`` 0; the first blocks must have run before.
            keep: hears of what every block gives that runs.
        """
        self._active, self._entering, self._keep = depth, hidden, keep
        try:
            logits: Tensor = self._forward(tokens).logits
        finally:
            self._keep = None
        return logits

    def _forward(self, tokens: Tensor) -> Any:
        try:
            return self.model(input_ids=tokens.to(device_of(self.model)), use_cache=False)
        finally:
            self._entering = None

    def _at_gate(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index > self._active and self._keep is None:
            self._output = hidden
            raise _Reached
        if index < self._active:
            behind_blocks = self._active == len(self.structure.blocks)
            return self._wrap[index](self._entering if behind_blocks else hidden)
        args, kwargs = tree_map(self._to_device, (args, kwargs))
        if index == self._active and self._entering is not None:
            if args:
                args = (self._entering, *args[1:])
            else:
                kwargs["hidden_states"] = self._entering
        output = self.structure.blocks[index].module(*args, **kwargs)
        if len(self._wrap) == index:
            self._wrap.append(_wrapper_like(output))
        hidden = output[0] if isinstance(output, tuple) else output
        if self._keep is not None:
            self._keep(index + 1, hidden)
            return output
        self._output = hidden
        raise _Reached

    def _to_device(self, leaf: Any) -> Any:
        return leaf.to(self.device) if isinstance(leaf, Tensor) else leaf


def _wrapper_like(output: Any) -> Callable[[Any], Any]:
    """Gives hidden states the form in which a block returns them: alone, or first of a tuple."""
    if isinstance(output, tuple):
        rest = (None,) * (len(output) - 1)
        return lambda hidden: (hidden, *rest)
    return lambda hidden: hidden
