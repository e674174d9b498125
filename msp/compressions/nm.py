"""N:M sparsity as a compression: every level of a unit is a pattern for its linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from msp import ops
from msp.base.identity import Identity
from msp.compressions.base import Compression
from msp.compressions.nm_database import PackedLevels
from msp.compressions.nm_ranks import Ranks
from msp.compressions.nm_weights import COPIED_BYTES, RankedWeight, Room
from msp.formats.patterns import NMPattern
from msp.models.structure import Linear, Structure
from msp.ops import PackedWeight
from msp.packed.sparse_linear import at_places
from msp.plan.budget import Level, Unit
from msp.plan.plans import patterns_of

Candidates = Mapping[str, Ranks] | Mapping[str, PackedLevels]
"""The source of candidates for each linear: its ranks, or its packed weights at every level."""


class NMSwitch:
    """The linears of a unit with the kept weights of a pattern, which can change at any time."""

    def __init__(self, weights: Mapping[Linear, RankedWeight], patterns: tuple[NMPattern, ...]) -> None:
        self.modules = {name: module for linear, own in weights.items() for name, module in own.modules(linear).items()}
        self._weights = list(weights.values())
        self._patterns = patterns

    def take(self, level: int) -> None:
        pattern = self._patterns[level]
        for weight in self._weights:
            weight.keep(pattern)


@dataclass
class NMCompression(Compression):
    """N of every M weights of a linear are kept; the label of a level is its pattern.

    Memory beyond the model: one byte a weight for the ranks of each M, and a second copy of the weights of each linear
    at a level between empty and dense. On a CPU the copies take at most ``COPIED_BYTES``. Weights from a database stay
    on disk, and their linears always have a copy.

    Attributes:
        structure: the blocks of the model.
        source: the rank codes or the packed weights of the linears; switches need them.
        database: whether ``source`` comes from a level database.
        pruned: the packed weight of a linear at a pattern, for ``settle``; None takes it from ``source``.
    """

    structure: Structure
    source: Candidates = field(default_factory=dict, repr=False)
    database: bool = False
    pruned: Callable[[Linear, NMPattern], PackedWeight] | None = None
    _room: Room = field(default_factory=lambda: Room(COPIED_BYTES), init=False, repr=False)

    @property
    def identity(self) -> Identity:
        return {"candidates": "database" if self.database else "ranks"}

    def levels(self, unit: Unit) -> tuple[Level, ...]:
        """The levels of ``unit``, which a plan has priced; ``UsageError`` if a label is not a pattern."""
        patterns_of(unit)
        return unit.levels

    def switch(self, unit: Unit) -> NMSwitch:
        weights = {}
        for name in unit.linears:
            linear, own = self._linears[name], self.source[name]
            device = linear.weight.device
            if not isinstance(own, PackedLevels):  # those stay where they are, and each level is brought when taken
                own = {size: codes.to(device) for size, codes in own.items()}
            weights[linear] = RankedWeight(linear, own, self._room if device.type == "cpu" else None)
        return NMSwitch(weights, patterns_of(unit))

    def settle(self, unit: Unit, level: int) -> dict[str, nn.Module]:
        """A ``SparseLinear`` at every place of every linear of ``unit``; none if the level is dense."""
        pattern, found = patterns_of(unit)[level], dict[str, nn.Module]()
        for name in unit.linears if not pattern.is_dense else ():
            linear = self._linears[name]
            packed = self._packed(linear, pattern) if self.pruned is None else self.pruned(linear, pattern)
            modules = at_places(packed, [place.module for place in linear.places])
            found |= zip((place.name for place in linear.places), modules, strict=True)
        return found

    def to(self, device: torch.device | str) -> NMCompression:
        source: Any = {name: _to(device, own) for name, own in self.source.items()}
        return replace(self, source=source)

    @cached_property
    def _linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.structure.linears}

    def _packed(self, linear: Linear, pattern: NMPattern) -> PackedWeight:
        weight = linear.weight.contiguous()
        if pattern.is_empty:
            return ops.nm_select(weight, pattern)
        own = self.source[linear.name]
        if isinstance(own, PackedLevels):
            return own[pattern].to(weight.device, weight.dtype)
        return ops.nm_select(weight, pattern, scores=-own[pattern.m].to(weight.device, torch.float32))


def _to(device: torch.device | str, own: Any) -> Any:
    """The rank codes of one linear, or its packed weights, on ``device``."""
    return type(own)({key: codes.to(device) for key, codes in own.items()})
