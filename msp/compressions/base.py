"""The interface of compressions: all that the search knows of what is done to a unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from msp.base.identity import Identity
from msp.errors import UsageError
from msp.models.structure import Structure
from msp.plan.budget import Level, Unit
from msp.plan.plans import UNITS


class Switch(Protocol):
    """A unit in the live model that can take any of its levels, at any time and in any order."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that stand in the model while candidates run, by the names of the modules that they replace."""
        ...

    def take(self, level: int) -> None:
        """Compute at ``level`` from now on; the outputs depend on the level alone, not on earlier levels."""
        ...


class Compression(ABC):
    """What can be done to the units of one model.

    A search on workers sends the object to them by pickle, together with the model. It must therefore hold no modules
    but those of the model.
    """

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """The inputs that the levels depend on, besides the model; a search resumes only if they agree."""

    @abstractmethod
    def levels(self, unit: Unit) -> tuple[Level, ...]:
        """The levels that ``unit`` can take, in rising cost."""

    @abstractmethod
    def switch(self, unit: Unit) -> Switch:
        """A switch for ``unit``, whose weights are in memory."""

    @abstractmethod
    def settle(self, unit: Unit, level: int) -> Mapping[str, nn.Module]:
        """The modules that finally stand in the model, by the names of the modules that they replace."""

    def to(self, device: torch.device | str) -> Compression:
        """The compression with its own tensors, if it has any, on ``device``."""
        return self


def units_of(structure: Structure, compression: Compression, *, unit: str = "linear") -> list[Unit]:
    """Every linear or every block of a model as a unit, in order of depth, with the levels of ``compression``.

    Args:
        structure: the blocks of the model.
        compression: gives each unit its levels.
        unit: ``"linear"`` or ``"block"``.

    Raises:
        UsageError: the unit is unknown, or the levels do not rise.
    """
    if unit not in UNITS:
        raise UsageError(f"unit {unit!r} is not one of {', '.join(UNITS)}")
    found = []
    for block in structure.blocks:
        groups = [block.linears] if unit == "block" else [(linear,) for linear in block.linears]
        for linears in filter(None, groups):
            name, kind = (block.name, "block") if unit == "block" else (linears[0].name, linears[0].kind)
            weights = sum(linear.weight.numel() for linear in linears)
            bare = Unit(name, tuple(linear.name for linear in linears), weights, block.index, kind)
            found.append(replace(bare, levels=compression.levels(bare)))
    return found
