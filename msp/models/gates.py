"""Runs a model piece by piece: the embeddings, one block, or the modules after the blocks.

Every block is replaced by a gate, and the model's own forward runs. The model itself therefore makes the embeddings,
masks and position encodings, with the arguments that this version of transformers passes. The gates before the wanted
piece pass hidden states through. The forward ends after the piece.

The ``State`` of a block is the part of its input that earlier blocks made: the hidden states, and every other argument
that reaches its gate only after those blocks ran (keys and values that blocks share, a residual stream, router states).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from msp.errors import MspError, first_line
from msp.models.structure import Structure, device_of

Slot = tuple[Any, ...]
"""The place of a value in the arguments of a block: the argument's position or name, and its key in a mapping."""


@dataclass(frozen=True)
class State:
    """The part of a block's input that the blocks before it made, or the output of the last block.

    Attributes:
        hidden: the hidden states, usually ``[B, T, H]``.
        left: other arguments that earlier blocks made, by slot: tensors, or tuples and lists of tensors.
    """

    hidden: Tensor
    left: Mapping[Slot, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self._flat()[0] if isinstance(leaf, Tensor)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """A state in which ``change`` was applied to every tensor."""
        return self.replaced([change(tensor) for tensor in self.tensors])

    def replaced(self, tensors: Sequence[Tensor]) -> State:
        """A state with new tensors, in the order of the property ``tensors``."""
        leaves, spec = self._flat()
        new = iter(tensors)
        hidden, left = tree_unflatten([next(new) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        return State(hidden, left)

    def to(self, device: torch.device | str) -> State:
        return self.map(lambda tensor: tensor.to(device))

    def _flat(self) -> tuple[list[Any], Any]:
        return tree_flatten((self.hidden, dict(self.left)))


Keep = Callable[[int, State], None]
"""A callback that receives a number of blocks and the state after them."""


class _Reached(Exception):
    """Ends the forward at the gate whose state was asked for."""


class _Gate(nn.Module):
    """Takes the place of one block while the context of a ``GatedModel`` is entered."""

    def __init__(self, block: nn.Module, index: int, gates: GatedModel) -> None:
        super().__init__()
        self.block = block
        self._index = index
        self._gates = [gates]  # in a list, so that nn.Module does not register it

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks, for example an attention type, before they call them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._gates[0]._at_gate(self._index, args, kwargs)


@dataclass
class _Run:
    """One forward of the gated model.

    Attributes:
        first: the first block that runs; the gates before it pass hidden states through.
        stop: the gate at which the forward ends, or the number of blocks to end after the last one; None runs it all.
        entering: the state for the first block, in the place of the hidden states that passed through.
        found: the hidden states at ``stop``, and the other arguments there by slot.
        keep: called with the state at every gate after the first block.
        passed: the gates that the forward reached.
    """

    first: int
    stop: int | None = None
    entering: State | None = None
    found: tuple[Tensor, dict[Slot, Any]] | None = None
    keep: Keep | None = None
    passed: set[int] = field(default_factory=set)


class GatedModel(AbstractContextManager["GatedModel"]):
    """A causal LM whose pieces can run one at a time, any number of times, while the context is entered.

    Args:
        model: the causal LM. Only the block that runs needs its weights in memory, on ``device``.
        structure: the blocks of the model, from ``find_structure``.
        device: the device that blocks run on; the rest of the model stays on its device.
    """

    def __init__(self, model: Any, structure: Structure, device: str | torch.device | None = None) -> None:
        self.model = model
        self.structure = structure
        self.device = torch.device(device) if device is not None else device_of(model)
        self._depth = len(structure.blocks)
        # The form in which each block returns hidden states; filled when the block has run.
        self._wrap: dict[int, Callable[[Any], Any]] = {}
        # The arguments that reach a gate only after the blocks before it ran; filled when they have run.
        self._carried: dict[int, frozenset[Slot]] = {}
        self._run = _Run(0)

    def __enter__(self) -> GatedModel:
        for block in self.structure.blocks:
            self.model.set_submodule(block.name, _Gate(block.module, block.index, self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self.structure.blocks:
            self.model.set_submodule(block.name, block.module)

    def embedded(self, tokens: Tensor) -> State:
        """The state before the first block, from int64 ``tokens [B, T]``."""
        return State(self._until(tokens, _Run(0, stop=0))[0])

    def block(self, index: int, tokens: Tensor, state: State | None = None) -> State:
        """The state after block ``index``: the input of the next block, or the output of the last block.

        Args:
            tokens: int64 ``[B, T]``, from which the model makes masks and positions.
            state: the state before the block; it may be None for the first block.

        Raises:
            MspError: the model's forward ends before it reaches the block.
        """
        entering = None if state is None else state.to(self.device)
        hidden, standing = self._until(tokens, _Run(index, index + 1, entering))
        if index + 1 not in self._carried:
            with torch.no_grad():
                self._carried[index + 1] = self._differing(index + 1, tokens, standing)
        return State(hidden, {slot: standing[slot] for slot in self._carried[index + 1] if slot in standing})

    def logits(self, tokens: Tensor, state: State) -> Tensor:
        """The logits ``[B, T, V]`` from the state after the last block; each block must have run before."""
        return self._logits(tokens, _Run(self._depth, entering=state.to(device_of(self.model))))

    def resume(self, depth: int, tokens: Tensor, state: State | None, keep: Keep) -> Tensor:
        """The logits ``[B, T, V]`` from the state after ``depth`` blocks, in one forward.

        Args:
            depth: the number of blocks that do not run.
            tokens: int64 ``[B, T]``.
            state: the state after ``depth`` blocks. It may be None for ``depth`` 0. For any other depth, each block
                must have run by itself before.
            keep: called with the state after every block that runs.
        """
        return self._logits(tokens, _Run(depth, entering=state, keep=keep))

    def why_not_one_by_one(self, tokens: Tensor) -> str | None:
        """The reason why single blocks do not give the result of a whole forward; None if they give it.

        The test runs ``tokens``, int64 ``[1, T]``, and then the same tokens in reverse order through each block. A
        block that remembers values from a call then holds values of other tokens, and the results differ. The blocks
        run on the device of the rest of the model.
        """
        counts = self.structure.calls
        if counts is not None and max(counts) > 1:
            again = next(block.name for block in self.structure.blocks if counts[block.index] > 1)
            return f"a forward runs {again} more than once"
        both, states = (tokens, tokens.flip(-1)), list[State | None]([None, None])
        device, self.device = self.device, device_of(self.model)
        try:
            with torch.no_grad():
                whole = self.resume(0, tokens, None, lambda *_: None)
                for block in self.structure.blocks:
                    states = [self.block(block.index, each, state) for each, state in zip(both, states, strict=True)]
                assert states[0] is not None
                single = self.logits(tokens, states[0])
        except Exception as error:  # any error that the model's own code raises if earlier blocks have not run
            return f"they do not run alone ({type(error).__name__}: {first_line(error)})"
        finally:
            self.device = device
        close = 1e-5 if whole.dtype == torch.float32 else 2e-2
        if not torch.allclose(single, whole, rtol=close, atol=close * float(whole.abs().max())):
            return "they exchange more than what they are called with"
        return None

    def _differing(self, index: int, tokens: Tensor, standing: Mapping[Slot, Any]) -> frozenset[Slot]:
        """The slots of ``standing``, at the gate ``index``, that are absent or differ if no block has run."""
        if index == self._depth:
            return frozenset()
        try:
            untouched = self._until(tokens, _Run(index, index))[1]
        except MspError:
            raise
        except Exception:  # the code between blocks may need the outputs of blocks: all arguments are carried then
            untouched = {}
        return frozenset(slot for slot, value in standing.items() if not _equal(value, untouched.get(slot)))

    def _until(self, tokens: Tensor, run: _Run) -> tuple[Tensor, dict[Slot, Any]]:
        """The hidden states and the other arguments at the gate at which ``run`` stops."""
        with suppress(_Reached):
            self._forward(tokens, run)
        if run.found is None:
            name = self.structure.blocks[min(run.first, self._depth - 1)].name
            raise MspError(f"a forward of {type(self.model).__name__} ends without coming to {name}")
        return run.found

    def _logits(self, tokens: Tensor, run: _Run) -> Tensor:
        logits: Tensor = self._forward(tokens, run).logits
        return logits

    def _forward(self, tokens: Tensor, run: _Run) -> Any:
        self._run = run
        try:
            return self.model(input_ids=tokens.to(device_of(self.model)), use_cache=False)
        finally:
            self._run = _Run(0)

    def _at_gate(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run
        standing = _entries(args, kwargs)
        # the hidden states are the first argument, or have the name that most models use
        at: Slot = ("hidden_states",) if ("hidden_states",) in standing else next(iter(standing))
        hidden = standing.pop(at)
        if run.stop == index:
            run.found = hidden, standing
            raise _Reached
        if index in run.passed and run.keep is None:
            name = self.structure.blocks[index].name
            raise MspError(f"a forward runs {name} more than once: it cannot be run alone, so load this model whole")
        run.passed.add(index)
        if index < run.first:
            behind_blocks = run.entering if run.first == self._depth else None
            return self._wrap[index](hidden if behind_blocks is None else behind_blocks.hidden)
        if run.keep is not None and index > run.first:
            left = {slot: standing[slot] for slot in self._carried.get(index, ()) if slot in standing}
            run.keep(index, State(hidden, left))
        args, kwargs = _moved((args, kwargs), self.device)
        if index == run.first and run.entering is not None:
            args = _put(args, kwargs, {at: run.entering.hidden, **run.entering.left})
        output = self.structure.blocks[index].module(*args, **kwargs)
        self._wrap.setdefault(index, _wrapper_like(output))
        if index == self._depth - 1:
            hidden = output[0] if isinstance(output, tuple) else output
            if run.stop == self._depth:
                run.found = hidden, {}
                raise _Reached
            if run.keep is not None:
                run.keep(self._depth, State(hidden))
        return output


def _entries(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Slot, Any]:
    """The arguments that hold tensors, by slot; each entry of a mapping has its own slot."""
    entries: dict[Slot, Any] = {}
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, value in named.items():
        if isinstance(value, Mapping):
            entries |= {(name, key): entry for key, entry in value.items()}
        else:
            entries[(name,)] = list(value) if isinstance(value, list) else value
    return {slot: value for slot, value in entries.items() if any(map(torch.is_tensor, tree_flatten(value)[0]))}


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], entries: Mapping[Slot, Any]) -> tuple[Any, ...]:
    """Put ``entries`` into their slots; returns the new positional arguments.

    Mappings and lists are changed in place, because blocks share them.
    """
    positional: list[Any] = list(args)
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for (name, *key), value in entries.items():
        holder: Any = positional if isinstance(name, int) else kwargs
        if key:
            holder[name][key[0]] = value
        elif isinstance(value, list) and isinstance(named.get(name), list):
            named[name][:] = value
        else:
            holder[name] = value
    return tuple(positional)


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` with all tensors on ``device``; mappings and lists are changed in place, because blocks share them."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, MutableMapping):
        for key in list(value):
            value[key] = _moved(value[key], device)
        return value
    if isinstance(value, list):
        value[:] = [_moved(item, device) for item in value]
        return value
    if type(value) is tuple:
        return tuple(_moved(item, device) for item in value)
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same tensors."""
    (first, spec), (second, other_spec) = tree_flatten(one), tree_flatten(other)
    return spec == other_spec and all(
        isinstance(a, Tensor) == isinstance(b, Tensor) and (torch.equal(a, b) if isinstance(a, Tensor) else True)
        for a, b in zip(first, second, strict=True)
    )


def _wrapper_like(output: Any) -> Callable[[Any], Any]:
    """A function that gives hidden states the form in which a block returns them: alone, or first in a tuple."""
    if isinstance(output, tuple):
        rest = (None,) * (len(output) - 1)
        return lambda hidden: (hidden, *rest)
    return lambda hidden: hidden
