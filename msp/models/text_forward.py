"""Records a forward of text: the modules that it calls, their order, and the weights that it changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msp.errors import first_line

# Tokens of the forward: enough for a convolution or a small window, few enough to cost nothing.
TOKENS = 8


@dataclass(frozen=True)
class TextForward:
    """The record of a forward of a few tokens.

    Attributes:
        calls: the watched modules that ran, by name, in the order of their calls. A module with several names that is
            called as many times stands under each name once.
        nested: the names in ``calls`` that ran inside another watched module.
        called: the names of all modules that ran.
        changes: the weights that the forward changed.
        remembering: the watched modules that keep tensors in attributes afterwards.
        failure: the reason why the forward failed; the other fields are then empty.
    """

    calls: tuple[str, ...] = ()
    nested: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()
    changes: Changes = field(default_factory=lambda: Changes())
    remembering: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each watched module ran; the first name of a module that ran repeatedly counts all its runs."""
        counts: dict[str, int] = defaultdict(int)
        for name in self.calls:
            counts[name] += 1
        return counts


@dataclass(frozen=True)
class Changes:
    """The parameters and buffers that a model's own forward changes.

    Attributes:
        before: their values before the first forward. A checkpoint holds these, and a model that is loaded from it
            begins with them.
        again: the names of those that a second forward changed too.
    """

    before: Mapping[str, Tensor] = field(default_factory=dict)
    again: frozenset[str] = frozenset()

    @contextmanager
    def undone(self, model: nn.Module) -> Iterator[None]:
        """Within the context the tensors that are left in ``model`` have their first values: for saving."""
        tensors = {name: tensor for name, tensor in _tensors(model).items() if name in self.before}
        now = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            self.undo(model)
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data.copy_(now[name])

    def undo(self, model: nn.Module) -> None:
        """Give the tensors that are left in ``model`` the values that they had before the first forward."""
        for name, tensor in _tensors(model).items():
            if name in self.before:
                tensor.data.copy_(self.before[name])

    @contextmanager
    def steady(self, model: nn.Module) -> Iterator[None]:
        """Within the context every forward of ``model`` starts from the same weights; the end restores them too."""
        kept = [(tensor, self.before[name]) for name, tensor in _tensors(model).items() if name in self.again]

        def restore(*_: Any) -> None:
            for tensor, value in kept:
                tensor.data.copy_(value)

        handle = model.register_forward_pre_hook(restore) if kept else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
                restore()


def run_text(model: nn.Module, watched: Sequence[str]) -> TextForward:
    """Run ``model`` on a few token ids and record the calls of the modules named ``watched``.

    A model on the meta device runs there: no weights are needed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name in watched:
        names[modules[name]].append(name)
    sequence: list[nn.Module] = []
    active: list[nn.Module] = []
    nested: set[str] = set()
    called: set[nn.Module] = set()

    def enter(module: nn.Module, *_: Any) -> None:
        called.add(module)
        if module in names:
            if active:
                nested.update(names[module])
            active.append(module)
            sequence.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        if module in names:
            active.pop()

    handles = []
    for module in dict.fromkeys(modules.values()):
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    modes = [(module, module.training) for module in modules.values()]
    remembered = {name: _attributes(modules[name]) for name in watched}
    try:
        model.eval()
        before = changed_by(model)
    except Exception as error:  # a model's own code may raise any kind
        return TextForward(failure=f"{type(error).__name__}: {first_line(error)}")
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    again: frozenset[str] = frozenset()
    if before and not any(value.is_meta for value in before.values()):
        model.eval()
        after = {name: tensor.detach().clone() for name, tensor in _tensors(model).items() if name in before}
        changed_by(model)
        tensors = _tensors(model)
        again = frozenset(name for name, value in after.items() if not _same(tensors[name], value))
    return TextForward(
        tuple(_by_name(sequence, names)),
        frozenset(nested),
        frozenset(name for name, module in modules.items() if module in called),
        Changes(before, again),
        tuple(name for name in watched if _attributes(modules[name]) - remembered[name]),
    )


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the content of the storages of ``tensors`` from before the first write.

    On the meta device no tensor has a value; there every question of a model about its input (no padding?) is true.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before: dict[str, Tensor] = {}
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, tensor in tensors.items():
            self._by_storage[tensor.untyped_storage()._cdata].append((name, tensor))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool
        schema = function._schema
        if schema.is_mutable:
            for argument, value in zip(schema.arguments, args, strict=False):
                self._about_to_write(argument, value)
            for argument in schema.arguments:
                self._about_to_write(argument, (kwargs or {}).get(argument.name))
        return function(*args, **(kwargs or {}))

    def _about_to_write(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                for name, held in self._by_storage.pop(tensor.untyped_storage()._cdata, []):
                    self.before[name] = held.detach().clone()


def changed_by(model: nn.Module) -> dict[str, Tensor]:
    """Run a few tokens; returns the changed tensors with their values from before."""
    held = {name: tensor.detach() for name, tensor in _tensors(model).items()}
    with torch.inference_mode(False), torch.no_grad(), _Writes(held) as writes:
        model(input_ids=_token_ids(model), use_cache=False)
    # also tensors that an assignment to a parameter or its data replaced
    now = _tensors(model)
    replaced = {
        name: tensor
        for name, tensor in held.items()
        if name in now and now[name].untyped_storage()._cdata != tensor.untyped_storage()._cdata
    }
    found = {**replaced, **writes.before}
    return {name: value for name, value in found.items() if not _same(value, now[name])}


def _attributes(module: nn.Module) -> set[int]:
    """The tensors in plain attributes of ``module`` and of its submodules, also in lists and dictionaries there."""
    plain = [
        value
        for part in module.modules()
        for name, value in vars(part).items()
        if name not in ("_parameters", "_buffers", "_modules")
    ]
    return {id(leaf) for value in plain for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and not one.is_meta and bool(torch.equal(one, other.to(one.device)))


def _token_ids(model: Any) -> Tensor:
    embeddings = model.get_input_embeddings()
    ids: Tensor = torch.arange(TOKENS, device=embeddings.weight.device)[None] % embeddings.num_embeddings
    return ids


def _by_name(sequence: Sequence[nn.Module], names: Mapping[nn.Module, list[str]]) -> Iterator[str]:
    """The calls by name. If a module with two names is called twice, its first call belongs to the first name."""
    seen: dict[nn.Module, int] = defaultdict(int)
    for module in sequence:
        own = names[module]
        yield own[seen[module]] if sequence.count(module) == len(own) else own[0]
        seen[module] += 1
