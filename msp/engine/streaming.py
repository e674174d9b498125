"""Runs candidates of a model that does not fit in memory: every block is loaded once for many candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msp.base.files import unwritable
from msp.base.progress import NoProgress, Progress
from msp.engine.candidates import RankedWeight, Ranks, precision, room_for_copies
from msp.engine.fitness import Job, Key
from msp.evidence.evaluate import Reference, Sums, summed
from msp.models.gates import GatedModel
from msp.models.hidden import HiddenStates
from msp.models.structure import Block
from msp.plan.budget import Unit

Item = tuple[int, Key]
"""The number of a batch, and the levels of all units or of the units up to some block."""


class StoredRanks(MutableMapping[str, Ranks]):
    """Rank codes in a folder, with one file per linear, which is memory-mapped when it is read.

    Raises:
        MspError: the file of a linear cannot be written; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()

    def __setitem__(self, name: str, ranks: Ranks) -> None:
        file = self._file(name)
        try:
            save_file({str(size): codes.cpu() for size, codes in ranks.items()}, file)
        except (OSError, SafetensorError) as error:
            raise unwritable(file, error) from error
        self._names.add(name)

    def __getitem__(self, name: str) -> Ranks:
        if name not in self._names:
            raise KeyError(name)
        return {int(size): codes for size, codes in load_file(self._file(name)).items()}

    def __delitem__(self, name: str) -> None:
        self._names.remove(name)
        self._file(name).unlink()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


class StreamingRunner:
    """Runs jobs block by block; candidates with equal levels up to a block share the output of that block.

    A candidate on a batch is an item. A group holds as many items as have hidden states that fit into ``hidden_bytes``,
    and at least one. Each group loads every block once. A state is freed after the last item that continues from it, so
    the number of states is at most the number of items in the group, plus the state that is being computed.

    Args:
        gates: the model; its context must not be entered.
        ranks: the rank codes of the linears of the units.
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
        ranks: Mapping[str, Ranks],
        units: Sequence[Unit],
        reference: Reference,
        *,
        hidden_bytes: int,
        progress: Progress | None = None,
    ) -> None:
        self._gates = gates
        self._ranks = ranks
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
                with self._ranked(block) as ranked, precision(self._gates.model):
                    self._pass(block, ranked, hidden, sorted({(batch, key[:reached]) for batch, key in group}), before)
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
        self, block: Block, ranked: Mapping[str, RankedWeight], hidden: HiddenStates, items: Sequence[Item], before: int
    ) -> None:
        """Run ``items``, with levels up to ``block``, through it; ``before`` levels belong to earlier blocks."""
        continued = Counter((batch, key[:before]) for batch, key in items)
        # The items are sorted by the levels of this block, so that each of its levels is applied once.
        for batch, key in sorted(items, key=lambda item: item[1][before:]):
            self._apply(ranked, key, before)
            parent = (block.index, batch, key[:before])
            entering = hidden.get(parent) if block.index else None
            output = self._gates.block(block.index, self._reference.tokens(batch), entering)
            continued[parent[1:]] -= 1
            if block.index and not continued[parent[1:]]:
                hidden.pop(parent)
            hidden.put((block.index + 1, batch, key), output)
            self.peak_bytes = max(self.peak_bytes, hidden.held + hidden.spilled)

    def _apply(self, ranked: Mapping[str, RankedWeight], key: Key, before: int) -> None:
        for unit, level in zip(self._units[before : len(key)], key[before:], strict=True):
            for name in unit.linears:
                ranked[name].keep(unit.patterns[level])

    @contextmanager
    def _ranked(self, block: Block) -> Iterator[dict[str, RankedWeight]]:
        """Within the context ``block`` is on its device with ranked linears; yields their weights by name."""
        linears = [linear for linear in block.linears if linear.name in self._ranks]
        with block.on(self._gates.device):
            self.loads += 1
            room = room_for_copies(self._gates.device)
            ranked = {
                linear.name: RankedWeight(linear, _on(self._ranks[linear.name], linear.weight), room)
                for linear in linears
            }
            try:
                for linear in linears:
                    self._gates.structure.put(linear, ranked[linear.name].modules(linear))
                yield ranked
            finally:
                for linear in linears:
                    self._gates.structure.put(linear, [place.module for place in linear.places])
                ranked.clear()  # a caller that still holds the dictionary must not keep this block in memory


def _on(ranks: Ranks, weight: Tensor) -> Ranks:
    return {size: codes.to(weight.device) for size, codes in ranks.items()}
