"""The weights of a linear that can take any N:M pattern while candidates run."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional

from msp import ops
from msp.compressions.nm_database import PackedLevels
from msp.compressions.nm_ranks import Ranks
from msp.formats.patterns import NMPattern
from msp.models.narrow import product_of_rows, scratch
from msp.models.structure import Linear

# The most bytes of copies of the kept weights, on a CPU. A linear without a copy selects its weights at each product.
COPIED_BYTES = 32 << 20


class Room:
    """A limited amount of memory that several objects share.

    Args:
        nbytes: the number of bytes.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._left = nbytes

    def take(self, owner: object, nbytes: int) -> bool:
        """Take ``nbytes`` for as long as ``owner`` lives, if they are left; returns whether they were."""
        if nbytes > self._left:
            return False
        self._left -= nbytes
        weakref.finalize(owner, self._give_back, nbytes)
        return True

    def _give_back(self, nbytes: int) -> None:
        self._left += nbytes

    def __reduce__(self) -> tuple[type[Room], tuple[int]]:
        return Room, (self._nbytes,)  # in another process nothing is taken


class RankedWeight:
    """A weight with a pattern that decides which of its values are kept; the pattern can change at any time.

    Args:
        linear: the dense linear, which is not changed.
        ranks: the ranks for every M of the patterns that the linear will have, or its packed weights at these patterns.
        room: the memory for a copy of the kept weights; None sets no limit. If it is spent, each product selects the
            kept weights again, a few rows at a time.
    """

    def __init__(self, linear: Linear, ranks: Ranks | PackedLevels, room: Room | None) -> None:
        self.pattern = NMPattern(4, 4)  # all weights, until ``keep`` is called
        self.dense = linear.weight.contiguous()
        self._ranks = ranks
        self._room = room
        self._copy: Tensor | None = None
        self._copied: NMPattern | None = None

    def keep(self, pattern: NMPattern) -> None:
        """Keep N of every M weights from now on."""
        self.pattern = pattern
        if pattern.is_dense or pattern.is_empty or pattern == self._copied:
            return
        always = isinstance(self._ranks, PackedLevels)  # each selection would read a file again
        if self._copy is None and (self._room is None or self._room.take(self, self.dense.nbytes) or always):
            self._copy = torch.empty_like(self.dense)
        if self._copy is not None:
            self._select(self._copy)
            self._copied = pattern

    def _select(self, out: Tensor) -> None:
        if isinstance(self._ranks, PackedLevels):
            ops.nm_unpack(self._ranks[self.pattern], out=out)
        else:
            ops.nm_keep(self.dense, self._ranks[self.pattern.m], self.pattern.n, out=out)

    @property
    def kept(self) -> Tensor:
        """The weight ``[R, K]`` with zeros in the place of the weights that are not kept."""
        if self.pattern.is_dense:
            return self.dense
        if self.pattern.is_empty:
            return torch.zeros_like(self.dense)
        if self._copy is not None:
            return self._copy
        kept = torch.empty_like(self.dense)
        self._select(kept)
        return kept

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b`` ``[..., R]`` with the kept weights W; a copy of the weights does not change the bits."""
        if self.pattern.is_empty:
            empty = x.new_zeros(*x.shape[:-1], len(self.dense))
            return empty if bias is None else empty + bias
        if x.device.type != "cpu":
            return functional.linear(x, self.kept, bias)
        return product_of_rows(x, len(self.dense), self._rows, bias)

    def _rows(self, rows: slice) -> Tensor:
        if self._copy is not None or self.pattern.is_dense:
            return self.kept[rows]
        assert not isinstance(self._ranks, PackedLevels)
        dense = self.dense[rows]
        out = scratch("kept", dense, dense.dtype)
        return ops.nm_keep(dense, self._ranks[self.pattern.m][rows], self.pattern.n, out=out)

    def modules(self, linear: Linear) -> dict[str, RankedLinear]:
        """One module for each place of the linear in the model, by the name of the place."""
        return {place.name: RankedLinear(self, place.bias) for place in linear.places}


class RankedLinear(nn.Module):
    """A linear with the kept weights of ``ranked``, and the bias of its own place in the model."""

    def __init__(self, ranked: RankedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self._ranked = ranked
        self.bias = bias
        self.out_features, self.in_features = ranked.dense.shape

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``, for model code that reads the weight and does not call the linear."""
        return self._ranked.kept

    def forward(self, x: Tensor) -> Tensor:
        return self._ranked.product(x, self.bias)
