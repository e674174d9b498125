"""Finds the blocks and linears of any Hugging Face causal LM, by structure alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from msp.errors import MspError


@dataclass(frozen=True)
class Linear:
    """A prunable matrix: an ``nn.Linear``, or GPT-2's ``Conv1D`` seen transposed.

    ``kind`` is the name inside the block (``self_attn.q_proj``), ``block`` the block's index.
    """

    name: str
    kind: str
    block: int
    module: nn.Module

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
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return None if bias is None else bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns


@dataclass(frozen=True)
class Block:
    """One transformer block: its module path, its module, its linears in definition order."""

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
    """The blocks of a model, and the weights inside them that are no linear (name -> reason)."""

    blocks: tuple[Block, ...]
    not_linear: Mapping[str, str] = field(default_factory=dict)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)


def find_structure(model: nn.Module) -> Structure:
    """The transformer blocks of ``model`` and the linears inside them.

    The blocks are the outermost ``nn.ModuleList`` whose members hold the most linear weights, all
    members of one class or several (hybrid models mix them).

    Raises:
        MspError: if no list of modules with linears exists.
    """
    candidates = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module)
        for name, module in candidates
        if not any(name.startswith(other + ".") for other, _ in candidates if other != name)
    ]
    weights = {name: sum(_linear_sizes(module)) for name, module in outermost}
    if not any(weights.values()):
        raise MspError(f"{type(model).__name__} has no list of transformer blocks with linears")
    list_name, block_list = max(outermost, key=lambda item: weights[item[0]])

    blocks, not_linear, seen = [], {}, set()
    for index, module in enumerate(block_list):
        block_name = f"{list_name}.{index}"
        linears = []
        for kind, child in module.named_modules():
            if _is_linear(child):
                if id(child.weight) not in seen:
                    seen.add(id(child.weight))
                    linears.append(Linear(f"{block_name}.{kind}", kind, index, child))
                continue
            for parameter_name, parameter in child.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    path = ".".join(filter(None, (block_name, kind, parameter_name)))
                    shape = list(parameter.shape)
                    not_linear[path] = f"a {shape} parameter of {type(child).__name__}, not a linear"
        blocks.append(Block(index, block_name, module, tuple(linears)))
    return Structure(tuple(blocks), not_linear)


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``x W^T + b`` and nothing else.

    A subclass of ``nn.Linear`` (a router that returns a tuple, a scaled projection) may compute
    something else under the same weight, so it is asked: one probe against the plain formula.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if module.weight.is_meta:
        try:  # one of the class that has weights to be asked
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


def _linear_sizes(module: nn.Module) -> list[int]:
    return [child.get_parameter("weight").numel() for child in module.modules() if _is_linear(child)]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; a model is on one device here."""
    return next(model.parameters()).device


def check_finite(linears: tuple[Linear, ...]) -> None:
    """Raise ``MspError`` naming the first linear with NaN or infinite weights, and how many."""
    for linear in linears:
        finite = torch.isfinite(linear.weight)
        if not finite.all():
            count = int(finite.numel() - finite.sum())
            raise MspError(f"{linear.name}: {count} of its {finite.numel()} weights are NaN or infinite")
