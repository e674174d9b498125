"""Puts candidate allocations into a live model and runs them: each costs a forward and one pass over what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from msp import ops
from msp.evaluate import Reference, Sums
from msp.gates import GatedModel, State
from msp.levels import Levels
from msp.model import Linear, Structure, device_of
from msp.narrow import computed_dtype, product_of_rows, scratch
from msp.patterns import NMPattern, Unit
from msp.search.database import PackedLevels
from msp.search.fitness import Job, Key

# What hidden states may take where nobody says it.
HIDDEN_BYTES = 4_000_000_000
# What copies of the weights that candidates keep may take on a CPU; without a copy, each product selects again.
COPIED_BYTES = 32 << 20

Point = tuple[int, int]
"""A batch, and behind how many blocks."""
Ranks = Mapping[int, Tensor]
"""Of one linear, for every M it may have: uint8 ``[R, K]`` from ``ops.nm_rank``."""
Candidates = Mapping[str, Ranks] | Mapping[str, PackedLevels]
"""By linear, what candidates are made from: ranks, or its weights at every level."""


class Room:
    """Memory that several may take from until it is spent.

    Args:
        nbytes: how much there is; without limit if None.
    """

    def __init__(self, nbytes: int | None) -> None:
        self._left = nbytes

    def take(self, nbytes: int) -> bool:
        """Whether there are ``nbytes``; they are taken if so."""
        if self._left is None:
            return True
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True


class RankedWeight:
    """A weight of which a pattern keeps a part, by ranks or from a database; the pattern can change at any time.

    Args:
        linear: the dense linear, left untouched.
        ranks: for every M of the patterns it will have; or its packed weights at these patterns.
        room: for a copy of what a pattern keeps. If there is none, each product selects it again, a few rows at a time.
    """

    def __init__(self, linear: Linear, ranks: Ranks | PackedLevels, room: Room) -> None:
        self.pattern = NMPattern(4, 4)  # all of them, until ``keep``
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
        always = isinstance(self._ranks, PackedLevels)  # it is read from a file
        if self._copy is None and (self._room.take(self.dense.nbytes) or always):
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
        """``[R, K]``, zero where nothing is kept."""
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
        """``x W^T + b`` with what is kept; the same bits with and without a copy of it."""
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

    def modules(self, linear: Linear) -> list[RankedLinear]:
        """One for each place of the linear."""
        return [RankedLinear(self, place.bias) for place in linear.places]


class RankedLinear(nn.Module):
    """A linear with what is kept of ``ranked``, and the bias of its own place."""

    def __init__(self, ranked: RankedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self._ranked = ranked
        self.bias = bias
        self.out_features, self.in_features = ranked.dense.shape

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``: for model code that takes it without a call."""
        return self._ranked.kept

    def forward(self, x: Tensor) -> Tensor:
        return self._ranked.product(x, self.bias)


def room_for_copies(device: torch.device) -> Room:
    """For the copies of a model's weights, or of a block's if one block at a time is there."""
    return Room(COPIED_BYTES if device.type == "cpu" else None)


class CandidateModel(AbstractContextManager["CandidateModel"]):
    """Within the context the units' linears are ranked; ``apply`` sets the level of every unit.

    Memory beyond the model: one byte a weight for the ranks of each M (what comes from a database stays on disk), and
    a second copy of the weights of the linears that are at a level between empty and dense: on a CPU of as many as
    ``COPIED_BYTES`` hold, or of all that come from a database.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        ranks: Candidates,
        units: Sequence[Unit],
    ) -> None:
        self.model = model
        self._structure = structure
        self._linears = [linear for linear in structure.linears if linear.name in ranks]
        self._units = units
        room = room_for_copies(device_of(model))
        self._ranked = {linear.name: RankedWeight(linear, ranks[linear.name], room) for linear in self._linears}

    def __enter__(self) -> CandidateModel:
        for linear in self._linears:
            self._structure.put(linear, self._ranked[linear.name].modules(linear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for linear in self._linears:
            self._structure.put(linear, [place.module for place in linear.places])

    def blocks_alike(self, one: Key, two: Key) -> int:
        """In how many blocks from the first on two candidates have the same levels."""
        for unit, first, second in zip(self._units, one, two, strict=True):
            if first != second:
                return unit.block
        return self._units[-1].block + 1

    def apply(self, levels: Sequence[int] | Levels) -> None:
        for unit, level in zip(self._units, levels, strict=True):
            for name in unit.linears:
                self._ranked[name].keep(unit.patterns[level])


def forward_in_bf16(model: nn.Module) -> bool:
    """Whether candidates' matrix products are computed in bf16: for an fp32 model on a CPU that has such products.

    That makes a forward about twice as fast on wiki6m and moves its KL by less than 2e-4, where candidates differ
    by 1e-2. Only the search does so: what is reported is measured in the model's own dtype.
    """
    in_fp32 = computed_dtype(model) == torch.float32
    return in_fp32 and device_of(model).type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def precision(model: nn.Module) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if forward_in_bf16(model) else nullcontext()


class LocalRunner:
    """Runs jobs in this process; candidates that agree up to a block share what comes out of it.

    Candidates run in the order of their levels, so hidden states, on the model's device, are held only between one
    and the next that begin alike.

    Args:
        candidates: the model with ranked linears, entered.
        reference: the dense model's predictions on all fitness tokens, or the user's loss on them.
        structure: the blocks of the model.
        hidden_bytes: what hidden states may take; where they do not fit, blocks run again.
    """

    def __init__(
        self,
        candidates: CandidateModel,
        reference: Reference,
        structure: Structure,
        *,
        hidden_bytes: int = HIDDEN_BYTES,
    ) -> None:
        self._candidates = candidates
        self._reference = reference
        self._gates = GatedModel(candidates.model, structure)
        self._hidden_bytes = hidden_bytes

    @property
    def batches(self) -> int:
        return self._reference.batches

    def run(self, jobs: Sequence[Job]) -> list[Sums]:
        order = sorted(range(len(jobs)), key=lambda number: jobs[number].levels)
        ordered = [jobs[number] for number in order]
        alike = [self._candidates.blocks_alike(one.levels, two.levels) for one, two in pairwise(ordered)]
        states: dict[Point, State] = {}
        sums: dict[int, Sums] = {}
        with torch.inference_mode(), self._gates:
            if any(alike) and not self._from_block_to_block:
                alike = [0] * len(alike)
            for place, job in enumerate(ordered):
                later = zip(ordered[place + 1 :], accumulate(alike[place:], min), strict=True)
                wanted = {(batch, depth) for other, depth in later for batch in other.batches if depth}
                sums[order[place]] = self._run(job, states, wanted)
                states = {key: state for key, state in states.items() if key in wanted}
        return [sums[number] for number in range(len(jobs))]

    def _run(self, job: Job, states: dict[Point, State], wanted: Set[Point]) -> Sums:
        """Start from the deepest of ``states``, which all belong to the job, and add those that are ``wanted``."""

        def keep(batch: int, depth: int, state: State) -> None:
            held = sum(other.nbytes for other in states.values())
            if (batch, depth) in wanted and held + state.nbytes <= self._hidden_bytes:
                states[batch, depth] = state

        self._candidates.apply(job.levels)
        total = Sums()
        for batch in job.batches:
            depth = max((depth for other, depth in states if other == batch), default=0)
            with precision(self._candidates.model):
                tokens, entering = self._reference.tokens(batch), states.get((batch, depth))
                total += self._reference.compare(
                    batch, self._gates.resume(depth, tokens, entering, partial(keep, batch))
                )
        return total

    @cached_property
    def _from_block_to_block(self) -> bool:
        """Whether a forward may start behind any block: not if blocks use more than their states."""
        tokens, states = self._reference.tokens(0)[:1], dict[int, State]()
        with precision(self._candidates.model):
            if self._gates.why_not_one_by_one(tokens) is not None:
                return False
            whole = self._gates.resume(0, tokens, None, states.__setitem__)
            # other tokens take the place of whatever the blocks remember
            self._gates.resume(0, tokens.flip(-1), None, lambda *_: None)
            starts = {len(self._gates.structure.blocks) // 2, len(self._gates.structure.blocks)} & states.keys()
            return all(
                torch.equal(self._gates.resume(start, tokens, states[start], lambda *_: None), whole)
                for start in starts
            )
