"""A layout: how the values and the bitmask of a packed weight lie in the memory of a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from msp.formats.patterns import NMPattern


class Size(NamedTuple):
    """The properties of a frozen weight ``[rows, columns]`` that decide which layouts serve it."""

    pattern: NMPattern
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    compliant: bool = False
    """Whether its aligned groups of 4 keep at most 2, though its pattern does not promise it."""


@dataclass(frozen=True)
class Layout(ABC):
    """The questions that a module asks of the layout of its weight; objects of one class are equal.

    A weight ``[R, K]`` is its values, its bitmask and its pattern. In *rows*, the canonical form that files have, the
    values are ``[R, K/M*N]`` and the bitmask is uint8 ``[R, ceil(K/8)]``.
    """

    name: ClassVar[str]

    @abstractmethod
    def serves(self, weight: Size) -> bool:
        """Whether a frozen weight of this size should lie so on its device."""

    @abstractmethod
    def arrange(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        """Values and bitmask in this layout, from those in rows."""

    @abstractmethod
    def restore(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        """The inverse of ``arrange``, to the bit."""

    @abstractmethod
    def product(
        self,
        x: Tensor,
        values: Tensor,
        bitmask: Tensor,
        bias: Tensor | None,
        pattern: NMPattern,
        columns: int,
        compliant: bool = False,
        kept: Tensor | None = None,
    ) -> Tensor:
        """``x W^T + b`` of a weight in this layout, as ``nm_linear`` computes it.

        Args:
            x: ``[..., columns]``.
            compliant: as in ``Size``.
            kept: what ``for_many_tokens`` returned.
        """

    def for_many_tokens(
        self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int, compliant: bool
    ) -> Tensor | None:
        """A second form of the weight that products of many tokens read; None if this layout needs none."""
        return None
