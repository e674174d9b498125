"""Puts candidates into a live model and runs them.

A candidate costs a forward, and the change of the units whose level changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any

import torch
from torch import nn

from msp.compressions.base import Compression, Switch
from msp.engine.fitness import Job, Key
from msp.evidence.evaluate import Reference, Sums
from msp.models.gates import GatedModel, State
from msp.models.narrow import computed_dtype
from msp.models.structure import Structure, device_of
from msp.plan.budget import Unit
from msp.plan.levels import Levels

# The most bytes of hidden states that are kept, by default.
HIDDEN_BYTES = 4_000_000_000

Point = tuple[int, int]
"""The number of a batch, and the number of blocks that it has passed."""


@contextmanager
def switched(structure: Structure, compression: Compression, units: Sequence[Unit]) -> Iterator[list[Switch]]:
    """Within the context the switches of ``units`` stand in the model; yields them in the order of the units."""
    switches = [compression.switch(unit) for unit in units]
    modules = {name: module for switch in switches for name, module in switch.modules.items()}
    with structure.replaced(modules):
        try:
            yield switches
        finally:
            switches.clear()  # a caller that still holds the list must not keep this block in memory


class CandidateModel(AbstractContextManager["CandidateModel"]):
    """Within the context a switch stands at every unit; ``apply`` sets the level of every unit.

    Args:
        model: the dense model, which is not changed.
        structure: the blocks of the model.
        compression: makes the switches.
        units: the units, in order of depth.
    """

    def __init__(self, model: nn.Module, structure: Structure, compression: Compression, units: Sequence[Unit]) -> None:
        self.model = model
        self._structure = structure
        self._compression = compression
        self._units = units
        self._entered = ExitStack()
        self._switches: list[Switch] = []

    def __enter__(self) -> CandidateModel:
        self._switches = self._entered.enter_context(switched(self._structure, self._compression, self._units))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def blocks_alike(self, one: Key, two: Key) -> int:
        """The number of leading blocks in which two candidates have the same levels."""
        for unit, first, second in zip(self._units, one, two, strict=True):
            if first != second:
                return unit.block
        return self._units[-1].block + 1

    def apply(self, levels: Sequence[int] | Levels) -> None:
        for switch, level in zip(self._switches, levels, strict=True):
            switch.take(level)


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
        candidates: the model with its switches, whose context is entered.
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
