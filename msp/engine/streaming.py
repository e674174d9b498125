"""Runs candidates of a model that does not fit in memory: every block is loaded once for many candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from msp.base.progress import NoProgress, Progress
from msp.compressions.base import Compression, Switch
from msp.engine.candidates import precision, switched
from msp.engine.fitness import Job, Key
from msp.evidence.evaluate import Reference, Sums, summed
from msp.models.gates import GatedModel
from msp.models.hidden import HiddenStates
from msp.models.structure import Block
from msp.plan.budget import Unit

Item = tuple[int, Key]
"""The number of a batch, and the levels of all units or of the units up to some block."""


class StreamingRunner:
    """Runs jobs block by block; candidates with equal levels up to a block share the output of that block.

    A candidate on a batch is an item. A group holds as many items as have hidden states that fit into ``hidden_bytes``,
    and at least one. Each group loads every block once. A state is freed after the last item that continues from it, so
    the number of states is at most the number of items in the group, plus the state that is being computed.

    Args:
        gates: the model; its context must not be entered.
        compression: makes the switches of the units, one block at a time.
        units: the units, in order of depth.
        reference: measures candidates on all fitness tokens.
        hidden_bytes: the most bytes of hidden states in host memory.
        progress: the progress display.

    Attributes:
        loads: the number of times that a block was loaded.
        peak_bytes: the most bytes that hidden states took.
    """

    def __init__(
        self,
        gates: GatedModel,
        compression: Compression,
        units: Sequence[Unit],
        reference: Reference,
        *,
        hidden_bytes: int,
        progress: Progress | None = None,
    ) -> None:
        self._gates = gates
        self._compression = compression
        self._units = units
        self._reference = reference
        self._hidden_bytes = hidden_bytes
        self._progress = progress or NoProgress()
        self.loads = 0
        self.peak_bytes = 0

    @property
    def batches(self) -> int:
        return self._reference.batches

    def run(self, jobs: Sequence[Job]) -> list[Sums]:
        items = sorted({(batch, job.levels) for job in jobs for batch in job.batches})
        measured: dict[Item, Sums] = {}
        if items:
            with torch.inference_mode(), self._gates:
                for group in self._groups(items):
                    measured |= self._measure(group)
        return [summed(measured[batch, job.levels] for batch in job.batches) for job in jobs]

    def _groups(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        size = max(1, self._hidden_bytes // self._gates.embedded(self._reference.tokens(0)).nbytes)
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _measure(self, group: Sequence[Item]) -> dict[Item, Sums]:
        hidden, reached = HiddenStates(self._hidden_bytes), 0
        blocks = self._gates.structure.blocks
        with self._progress.stage(f"Blocks for {len(group)} candidates x batches", len(blocks)) as advance:
            for block in blocks:
                before, reached = reached, sum(unit.block <= block.index for unit in self._units)
                items = sorted({(batch, key[:reached]) for batch, key in group})
                with block.on(self._gates.device):
                    self.loads += 1
                    own = self._units[before:reached]
                    with (
                        switched(self._gates.structure, self._compression, own) as switches,
                        precision(self._gates.model),
                    ):
                        self._pass(block, switches, hidden, items, before)
                advance(block.index + 1, held_bytes=hidden.held, loads=self.loads)
        measured = {}
        with precision(self._gates.model):
            for batch, key in group:
                state = hidden.pop((len(blocks), batch, key))
                measured[batch, key] = self._reference.compare(
                    batch, self._gates.logits(self._reference.tokens(batch), state)
                )
        return measured

    def _pass(
        self, block: Block, switches: Sequence[Switch], hidden: HiddenStates, items: Sequence[Item], before: int
    ) -> None:
        """Run ``items``, with levels up to ``block``, through it; ``before`` levels belong to earlier blocks."""
        continued = Counter((batch, key[:before]) for batch, key in items)
        # The items are sorted by the levels of this block, so that each of its levels is applied once.
        for batch, key in sorted(items, key=lambda item: item[1][before:]):
            for switch, level in zip(switches, key[before:], strict=True):
                switch.take(level)
            parent = (block.index, batch, key[:before])
            entering = hidden.get(parent) if block.index else None
            output = self._gates.block(block.index, self._reference.tokens(batch), entering)
            continued[parent[1:]] -= 1
            if block.index and not continued[parent[1:]]:
                hidden.pop(parent)
            hidden.put((block.index + 1, batch, key), output)
            self.peak_bytes = max(self.peak_bytes, hidden.held + hidden.spilled)
