"""Finds the blocks and linears of any Hugging Face causal LM from a forward of text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from msp.base.finite import check_finite as check_tensors_finite
from msp.errors import MspError
from msp.models.narrow import LINEARS
from msp.models.text_forward import Changes, TextForward, run_text


@dataclass(frozen=True)
class Place:
    """The place of a matrix: its name in the model, its ``kind`` (its name in the block), its block, its module."""

    name: str
    kind: str
    block: int
    module: nn.Module

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return None if bias is None else bias.detach()


def merge_experts(kind: str) -> str:
    """One name for the linears of all experts: ``mlp.experts.5.w1`` -> ``mlp.experts.*.w1``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", kind)


@dataclass(frozen=True)
class Linear(Place):
    """A prunable matrix: an ``nn.Linear``, or GPT-2's ``Conv1D`` seen transposed.

    ``kind`` is the name inside the block (``self_attn.q_proj``), ``block`` the block's index. A weight that several
    blocks share is one linear. It bears the name of its first place, and ``others`` are the later places.
    """

    others: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Every place of the weight, in the order of execution."""
        return (self, *self.others)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The module of every place, each once."""
        return tuple(dict.fromkeys(place.module for place in self.places))

    @property
    def last_block(self) -> int:
        """The last block that has the weight."""
        return max(place.block for place in self.places)

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as ``[out_features, in_features]``; shares memory with the module."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach().t() if self.transposed else weight.detach()

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns


@dataclass(frozen=True)
class Block:
    """One transformer block: its module path, its module, its linears in definition order.

    A linear whose weight stands in an earlier block too belongs to the earlier block.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[Linear, ...]

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within the context the block's weights are on ``device``."""
        home = device_of(self.module)
        self.module.to(device)
        try:
            yield
        finally:
            self.module.to(home)


@dataclass(frozen=True)
class Structure:
    """The parts of a model that can be pruned, and those that cannot.

    Attributes:
        blocks: the blocks of all stacks that a forward of text runs, in the order of execution.
        not_linear: weights inside the blocks that are no linear (name -> reason).
        outside: linears that are in no block, or in a block that no forward of text runs (name -> reason).
        calls: how often a forward runs each block; None if no forward could be run, for the reason in ``failure``.
        unreached: names of linears that a forward of a few tokens did not call.
        changes: the changes that the model's own forward makes to its weights.
        remembering: names of blocks that keep tensors of a forward in attributes, from which other blocks may read
            them.
    """

    blocks: tuple[Block, ...]
    not_linear: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[int, ...] | None = None
    unreached: frozenset[str] = frozenset()
    changes: Changes = field(default_factory=Changes)
    remembering: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def skipped(self) -> dict[str, str]:
        """Everything that is never pruned, with the reason."""
        return {**self.not_linear, **self.outside}

    @contextmanager
    def replaced(self, modules: Mapping[str, nn.Module], stays: Callable[[], bool] = bool) -> Iterator[None]:
        """Within the context, or for good if ``stays`` returns true, ``modules`` replace those of their names.

        Raises:
            MspError: a name is in no block.
        """
        places = [(*self._inside(name), module) for name, module in modules.items()]
        # Read before any is replaced: blocks may share the part of the model that holds several of them.
        before = [(block, kind, block.get_submodule(kind)) for block, kind, _ in places]
        try:
            for block, kind, module in places:
                block.set_submodule(kind, module)
            yield
        finally:
            for block, kind, module in () if stays() else before:
                block.set_submodule(kind, module)

    def _inside(self, name: str) -> tuple[nn.Module, str]:
        """The block that holds the module with ``name``, and the module's name in it."""
        for block in self.blocks:
            if name.startswith(f"{block.name}."):
                return block.module, name.removeprefix(f"{block.name}.")
        raise MspError(f"{name} is in none of the {len(self.blocks)} blocks")


def find_structure(model: nn.Module) -> Structure:
    """The transformer blocks of ``model`` and the linears inside them.

    Blocks are the members of every outermost ``nn.ModuleList`` that hold linears and that a forward of text runs, one
    after the other. These are all stacks of a language model, but no vision or audio tower of any size. If no forward
    can be run, the blocks are the members of the lists that lie next to the input embeddings.

    Raises:
        MspError: if no list of modules with linears exists, or text runs none of them.
    """
    members = _members(model)
    if not members:
        raise MspError(f"{type(model).__name__} has no list of transformer blocks with linears")
    text = run_text(model, list(members))
    if text.failure is not None:
        order, reasons = _beside_embeddings(model, members), {}
    else:
        order = [name for name in dict.fromkeys(text.calls) if name not in text.nested]
        reasons = {name: "its block is run inside another block" for name in text.nested}
    if not order:
        raise MspError(f"{type(model).__name__}: a forward of text runs none of its lists of blocks")
    blocks, not_linear, outside = _linears_of(model, {name: members[name] for name in order})
    for name, module in model.named_modules():
        inside = next((member for member in members if name == member or name.startswith(f"{member}.")), None)
        if inside in order or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        outside[name] = reasons.get(inside or "") or _why_outside(model, name, module, inside, text)
    counts = text.counts
    names = {linear.name: [place.name for place in linear.places] for block in blocks for linear in block.linears}
    unreached = {name for name, places in names.items() if text.failure is None and not text.called & {*places}}
    return Structure(
        blocks,
        not_linear,
        outside,
        None if text.failure else tuple(counts[block.name] for block in blocks),
        frozenset(unreached),
        text.changes,
        text.remembering,
        text.failure,
    )


def _members(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost lists that contain linears and are not linears themselves, by name."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists if other != name)
    ]
    return {
        f"{name}.{index}": member
        for name, module in outermost
        for index, member in enumerate(module)
        if not isinstance(member, (nn.Linear, Conv1D)) and any(_is_linear(child) for child in member.modules())
    }


def _beside_embeddings(model: nn.Module, members: Mapping[str, nn.Module]) -> list[str]:
    """The ``members`` inside the smallest module that holds the input embeddings and at least one member."""
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    path = next((name for name, module in model.named_modules() if module is embeddings), "")
    while path:
        path = path.rpartition(".")[0]
        found = [name for name in members if name.startswith(f"{path}." if path else "")]
        if found:
            return found
    return list(members)


def _linears_of(
    model: nn.Module, members: Mapping[str, nn.Module]
) -> tuple[tuple[Block, ...], dict[str, str], dict[str, str]]:
    """The blocks, their parameters that are no linear, and the linears whose weight a module outside shares."""
    elsewhere = {
        weight_identity(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(tuple(f"{member}." for member in members))
    }
    not_linear: dict[str, str] = {}
    outside: dict[str, str] = {}
    places: dict[Hashable, list[Place]] = defaultdict(list)
    for index, (block_name, module) in enumerate(members.items()):
        for kind, child in module.named_modules(remove_duplicate=False):
            name = f"{block_name}.{kind}"
            if _is_linear(child):
                identity = weight_identity(child.get_parameter("weight"))
                if identity in elsewhere:
                    outside[name] = f"its weight is that of {elsewhere[identity]} too"
                else:
                    places[identity, isinstance(child, Conv1D)].append(Place(name, kind, index, child))
                continue
            for parameter_name, parameter in child.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    path = ".".join(filter(None, (block_name, kind, parameter_name)))
                    shape = list(parameter.shape)
                    not_linear[path] = f"a {shape} parameter of {type(child).__name__}, not a linear"
    linears: dict[int, list[Linear]] = defaultdict(list)
    for first, *others in places.values():
        linears[first.block].append(Linear(first.name, first.kind, first.block, first.module, tuple(others)))
    blocks = [Block(index, name, module, tuple(linears[index])) for index, (name, module) in enumerate(members.items())]
    return tuple(blocks), not_linear, outside


def weight_identity(parameter: torch.Tensor) -> Hashable:
    """A key that is equal for parameters that are one weight: the same object, or the same memory."""
    if parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr(), parameter.shape, parameter.stride()


def _why_outside(model: nn.Module, name: str, module: nn.Module, inside: str | None, text: TextForward) -> str:
    """The reason why a linear that is in no block of ``order`` is not pruned."""
    find = getattr(model, "get_output_embeddings", None)
    if callable(find) and find() is module:
        return "the output head"
    if text.failure is not None:
        return "not one of the blocks beside the input embeddings"
    if name not in text.called:
        return "a forward of text does not run it"
    return "not inside a block" if inside is None else "its block is run inside another block"


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``x W^T + b`` and nothing else.

    A subclass of ``nn.Linear`` (a router that returns a tuple, a scaled projection) may compute something else with the
    same weight. The function therefore compares one probe with the plain formula.
    """
    if type(module) in LINEARS:
        return True
    if not isinstance(module, nn.Linear):
        return False
    if module.weight.is_meta:
        try:  # an instance of the class whose weights can be probed
            module = type(module)(8, 8, bias=module.bias is not None)
        except TypeError:
            return False
    probe = torch.linspace(-1, 1, module.in_features, device=module.weight.device, dtype=module.weight.dtype)
    with torch.no_grad():
        try:
            found = module(probe[None])
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        expected = nn.functional.linear(probe[None], module.weight, module.bias)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters; a model is on one device here."""
    return next(model.parameters()).device


def check_finite(linears: tuple[Linear, ...]) -> None:
    """Raise ``MspError`` naming the first linear with NaN or infinite weights, and how many."""
    check_tensors_finite((linear.name, linear.weight) for linear in linears)
