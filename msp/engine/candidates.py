"""Puts candidate allocations into a live model and runs them.

A candidate costs a forward, and one pass over the weights of the linears whose level changed.
"""

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
from msp.engine.database import PackedLevels
from msp.engine.fitness import Job, Key
from msp.evidence.evaluate import Reference, Sums
from msp.formats.patterns import NMPattern
from msp.models.gates import GatedModel, State
from msp.models.narrow import computed_dtype, product_of_rows, scratch
from msp.models.structure import Linear, Structure, device_of
from msp.plan.budget import Unit
from msp.plan.levels import Levels

# The most bytes of hidden states that are kept, by default.
HIDDEN_BYTES = 4_000_000_000
# The most bytes of copies of the kept weights, on a CPU. A linear without a copy selects its weights at each product.
COPIED_BYTES = 32 << 20

Point = tuple[int, int]
"""The number of a batch, and the number of blocks that it has passed."""
Ranks = Mapping[int, Tensor]
"""The rank codes of one linear, for every M it may have: uint8 ``[R, K]`` from ``ops.nm_rank``."""
Candidates = Mapping[str, Ranks] | Mapping[str, PackedLevels]
"""The source of candidates for each linear: its ranks, or its packed weights at every level."""


class Room:
    """A limited amount of memory that several objects share.

    Args:
        nbytes: the number of bytes; None sets no limit.
    """

    def __init__(self, nbytes: int | None) -> None:
        self._left = nbytes

    def take(self, nbytes: int) -> bool:
        """Take ``nbytes`` if they are left; returns whether they were."""
        if self._left is None:
            return True
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True


class RankedWeight:
    """A weight with a pattern that decides which of its values are kept; the pattern can change at any time.

    Args:
        linear: the dense linear, which is not changed.
        ranks: the ranks for every M of the patterns that the linear will have, or its packed weights at these patterns.
        room: the memory for a copy of the kept weights. If it is spent, each product selects the kept weights again, a
            few rows at a time.
    """

    def __init__(self, linear: Linear, ranks: Ranks | PackedLevels, room: Room) -> None:
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

    def modules(self, linear: Linear) -> list[RankedLinear]:
        """One module for each place of the linear in the model."""
        return [RankedLinear(self, place.bias) for place in linear.places]


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


def room_for_copies(device: torch.device) -> Room:
    """The memory for copies of the weights of a model, or of a block if the model is streamed."""
    return Room(COPIED_BYTES if device.type == "cpu" else None)


class CandidateModel(AbstractContextManager["CandidateModel"]):
    """Within the context the linears of the units are ``RankedLinear``; ``apply`` sets the level of every unit.

    Memory beyond the model: one byte a weight for the ranks of each M, and a second copy of the weights of each linear
    at a level between empty and dense. On a CPU the copies take at most ``COPIED_BYTES``. Weights from a database stay
    on disk, and their linears always have a copy.
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
        """The number of leading blocks in which two candidates have the same levels."""
        for unit, first, second in zip(self._units, one, two, strict=True):
            if first != second:
                return unit.block
        return self._units[-1].block + 1

    def apply(self, levels: Sequence[int] | Levels) -> None:
        for unit, level in zip(self._units, levels, strict=True):
            for name in unit.linears:
                self._ranked[name].keep(unit.patterns[level])


def forward_in_bf16(model: nn.Module) -> bool:
    """Whether the matrix products of candidates are computed in bf16: for an fp32 model on a CPU with bf16 products.

    A forward of wiki6m is then about twice as fast, and its KL moves by less than 2e-4, while candidates differ by
    1e-2. Only the search uses bf16: all reported figures are measured in the model's own dtype.
    """
    in_fp32 = computed_dtype(model) == torch.float32
    return in_fp32 and device_of(model).type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def precision(model: nn.Module) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if forward_in_bf16(model) else nullcontext()


class LocalRunner:
    """Runs jobs in this process; candidates with equal levels up to a block share the output of that block.

    Candidates run in the order of their levels. The hidden states, on the model's device, are therefore held only
    until the last candidate that begins with the same levels.

    Args:
        candidates: the model with ranked linears, whose context is entered.
        reference: the dense model's predictions on all fitness tokens, or the user's loss on them.
        structure: the blocks of the model.
        hidden_bytes: the most bytes of hidden states; if they do not fit, blocks run again.
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
        """Run a job from the deepest of ``states``, which all fit its levels, and add the ``wanted`` states."""

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
        """Whether a forward may start after any block; false if blocks read more than their ``State``."""
        tokens, states = self._reference.tokens(0)[:1], dict[int, State]()
        with precision(self._candidates.model):
            if self._gates.why_not_one_by_one(tokens) is not None:
                return False
            whole = self._gates.resume(0, tokens, None, states.__setitem__)
            # after a run on other tokens the blocks remember nothing of the first run
            self._gates.resume(0, tokens.flip(-1), None, lambda *_: None)
            starts = {len(self._gates.structure.blocks) // 2, len(self._gates.structure.blocks)} & states.keys()
            return all(
                torch.equal(self._gates.resume(start, tokens, states[start], lambda *_: None), whole)
                for start in starts
            )
