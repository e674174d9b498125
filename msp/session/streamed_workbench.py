"""The workbench of a model that is not in memory as a whole, but one block at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from msp.models.loading import LoadedModel
from msp.models.structure import Linear, check_finite
from msp.ops import CodedWeight, PackedWeight
from msp.packed.sparse_linear import SparseLinear
from msp.pruners import Pruner
from msp.session.workbench import Workbench
from msp.session.writers import Writer, block_writer


class StreamedWorkbench(Workbench):
    """``Workbench`` without the parts that take as much memory as the model; arguments and results are the same.

    ``hidden_bytes`` is host memory here, and also serves Fisher traces. Rank codes go into ``folder``, or into the
    temporary folder of the system.
    """

    def __init__(self, *args: Any, folder: Path | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._folder = folder

    @property
    def whole(self) -> bool:
        """Never: ``gates`` refuses a model that cannot run one block at a time."""
        return False

    def _hashed_weights(self) -> dict[str, str]:
        """As for a model in memory; every block is read once."""
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
        """A folder for rank codes that lives as long as this workbench; ``MspError`` if they do not fit."""
        folder = scratch_folder(self, "ranks", self._folder)
        needed = sum(linear.weight.numel() * len(self.group_sizes(linear.name)) for linear in self.linears)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise MspError(
                f"rank codes take {needed:,} bytes on disk, and {folder} has {free:,}: choose another work_dir"
            )
        return StoredRanks(folder)

    def writer(
        self, loaded: LoadedModel, output: str | Path | None, *, force: bool, size: int
    ) -> AbstractContextManager[Writer]:
        assert output is not None, "prune refuses that"
        return block_writer(self, loaded, output, force=force, size=size)

    def prune_blocks(
        self,
        write: Callable[[nn.Module, str], None],
        allocation: Allocation,
        pruner: Pruner,
        references: Sequence[Reference],
    ) -> list[Sums]:
        """Prune block by block, each calibrated after the pruned ones before it, and ``write`` each before the next.

        Host memory: a hidden state for each token of calibration and of ``references``.

        Args:
            write: stores a pruned block under the names that begin with a prefix.

        Returns:
            The sums of every reference of the pruned model.
        """
        gates = GatedModel(self.model, self.structure, self._device)
        calibration = BlockStream(gates, self.tokens.calibration, batch_size=self._batch_size)
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
                            write(block.module, f"{block.name}.")
                    advance(block.index + 1)
            return [
                summed(each.compare(batch, logits) for batch, logits in enumerate(stream.logits()))
                for each, stream in zip(references, measured, strict=True)
            ]

    def packed_on_no_device(self, allocation: Allocation) -> dict[str, PackedWeight | CodedWeight]:
        """The packed weights of ``allocation``, without data."""
        return {
            linear.name: _on_no_device(linear, allocation[linear.name])
            for linear in self.linears
            if not allocation[linear.name].is_dense
        }

    def predictions(self, windows: Tensor, label: str, *, batch_size: int | None = None) -> DenseReference:
        size = batch_size or self._batch_size
        logits = streamed_logits(
            self.model, self.structure, windows, batch_size=size, device=self._device, progress=self.progress
        )
        return DenseReference(self.model, windows, batch_size=size, progress=self.progress, label=label, logits=logits)

    def runner(
        self, compression: Compression, reference: Reference, workers: Workers | None = None
    ) -> AbstractContextManager[Runner]:
        assert workers is None, "Options.parse refuses them"
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
