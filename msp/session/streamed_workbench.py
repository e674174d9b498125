"""The workbench of a model that is not in memory as a whole: one block at a time is there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msp.base.identity import hashed_tensors
from msp.base.staging import scratch_folder
from msp.compressions.base import Compression
from msp.compressions.nm_database import PackedLevels
from msp.compressions.nm_ranks import Ranks, StoredRanks
from msp.engine.distributed import Workers
from msp.engine.fitness import Runner
from msp.engine.streaming import StreamingRunner
from msp.errors import MspError, UsageError
from msp.evidence.calibration import BlockStream, gather
from msp.evidence.evaluate import DenseReference, Reference, Sums, summed
from msp.evidence.streamed import streamed_logits
from msp.formats.patterns import Allocation, NMPattern
from msp.models.gates import GatedModel
from msp.models.structure import Linear, check_finite
from msp.ops import CodedWeight, PackedWeight
from msp.packed.checkpoint import PackedShards
from msp.packed.sparse_linear import SparseLinear
from msp.pruners import Pruner
from msp.session.workbench import Workbench


class StreamedWorkbench(Workbench):
    """``Workbench`` without what takes as much memory as the model; arguments and answers are the same.

    ``hidden_bytes`` is host memory here, and also for Fisher traces; rank codes go into ``folder``, or where the
    system has its temporary files.
    """

    def __init__(self, *args: Any, folder: Path | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._folder = folder

    @property
    def whole(self) -> bool:
        """Never: gates refuse what cannot be run one block at a time."""
        return False

    def _hashed_weights(self) -> dict[str, str]:
        """As of the model in memory; every block is read once."""
        found: dict[str, str] = {}
        for block in self.structure.blocks:
            with block.on(torch.device("cpu")):
                state = block.module.state_dict(keep_vars=True)
                found |= hashed_tensors({f"{block.name}.{name}": tensor for name, tensor in state.items()})
        state = self.model.state_dict(keep_vars=True)
        return found | hashed_tensors({name: tensor for name, tensor in state.items() if name not in found})

    def _measure_traces(self) -> dict[str, float]:
        return self._traces_by_blocks(self._hidden_bytes)

    def fisher_diagonals(self) -> Mapping[str, Tensor]:
        raise UsageError("Fisher diagonals are as large as the model in float32: one that is streamed has none")

    def levels(self, pruner: Pruner, folder: Path, *, resume: bool = False) -> dict[str, PackedLevels]:
        raise UsageError("a level database is made of a model in memory: one that is streamed has none")

    def _room_for_ranks(self) -> MutableMapping[str, Ranks]:
        """A folder for rank codes that goes with this workbench; ``MspError`` where they do not fit."""
        folder = scratch_folder(self, "ranks", self._folder)
        needed = sum(linear.weight.numel() * len(self.group_sizes(linear.name)) for linear in self.linears)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise MspError(
                f"rank codes take {needed:,} bytes on disk, and {folder} has {free:,}: choose another work_dir"
            )
        return StoredRanks(folder)

    def prune_to(
        self,
        shards: PackedShards,
        allocation: Allocation,
        pruner: Pruner,
        test: DenseReference,
        fitness: Reference | None,
    ) -> tuple[dict[str, PackedWeight | CodedWeight], Sums, Sums | None]:
        """Prune block by block, each calibrated behind its pruned predecessors, and store each before the next one.

        Host memory: a hidden state for each token of calibration, ``test`` and ``fitness``.

        Returns:
            The packed weights on no device; and what ``test`` and ``fitness``, where it is given, say of the model.
        """
        gates = GatedModel(self.model, self.structure, self._device)
        calibration = BlockStream(gates, self.tokens.calibration, batch_size=self._batch_size)
        references = [test] if fitness is None else [test, fitness]
        measured = [BlockStream(gates, each.windows, batch_size=each.batch_size) for each in references]
        with gates:
            with self.progress.stage("Pruning", len(self.structure.blocks)) as advance:
                for block in self.structure.blocks:
                    with block.on(gates.device):
                        check_finite(block.linears)
                        with gather(block.linears, pruner.needs) as statistics:
                            for _ in calibration.run(block.index, advance=False):
                                pass
                        with self.packed(block, statistics, allocation, pruner):
                            for stream in (calibration, *measured):
                                stream.pass_through(block.index)
                            shards.write(block.module, f"{block.name}.")
                    advance(block.index + 1)
            sums = [
                summed(each.compare(batch, logits) for batch, logits in enumerate(stream.logits()))
                for each, stream in zip(references, measured, strict=True)
            ]
        packed = {
            linear.name: _on_no_device(linear, allocation[linear.name])
            for linear in self.linears
            if not allocation[linear.name].is_dense
        }
        return packed, sums[0], sums[1] if fitness is not None else None

    def predictions(self, windows: Tensor, label: str, *, batch_size: int | None = None) -> DenseReference:
        size = batch_size or self._batch_size
        logits = streamed_logits(
            self.model, self.structure, windows, batch_size=size, device=self._device, progress=self.progress
        )
        return DenseReference(self.model, windows, batch_size=size, progress=self.progress, label=label, logits=logits)

    def runner(
        self, compression: Compression, reference: Reference, workers: Workers | None = None
    ) -> AbstractContextManager[Runner]:
        assert workers is None, "PruneOptions refuses them"
        runner = StreamingRunner(
            GatedModel(self.model, self.structure, self._device),
            compression,
            self.plan.units,
            reference,
            hidden_bytes=self._hidden_bytes,
            progress=self.progress,
        )
        return nullcontext(runner)


def _on_no_device(linear: Linear, pattern: NMPattern) -> PackedWeight | CodedWeight:
    rows, columns = linear.shape
    return SparseLinear(columns, rows, pattern, device="meta", dtype=linear.weight.dtype).packed
