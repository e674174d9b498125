"""The way of pruned weights into a model, and of the model to a folder: in memory, or a block at a time.

A weight is packed once. In memory it then stands in the model, which is saved as it is; a streamed block is stored
before the next one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msp.base.host_memory import give_back
from msp.evidence.evaluate import Reference, Sums
from msp.formats.patterns import Allocation
from msp.models.loading import LoadedModel
from msp.packed.checkpoint import as_stored, mark_packed, packed_shards, replace_linears, save_packed
from msp.packed.sparse_linear import note_pattern
from msp.pruners import Pruner

if TYPE_CHECKING:
    from msp.session.streamed_workbench import StreamedWorkbench
    from msp.session.workbench import Workbench

Clock = Callable[[str], AbstractContextManager[None]]


class Writer(Protocol):
    """Prunes a model to an allocation and writes it, in this order."""

    def prune(
        self, allocation: Allocation, pruner: Pruner, references: Sequence[Reference], clock: Clock
    ) -> list[Sums]:
        """Prune the model; the sums of every reference are of the pruned model."""
        ...

    def pack(self) -> None:
        """Let the model be the packed one for good. Until then, an error makes it dense again if it is in memory."""
        ...

    def save(self, recipe: Mapping[str, Any], clock: Clock) -> None:
        """Write the model and ``recipe``, if there is an output."""
        ...


class MemoryWriter:
    """A model in memory: pruned in place, measured, and saved as it stands."""

    def __init__(self, bench: Workbench, loaded: LoadedModel, output: str | Path | None, force: bool) -> None:
        self._bench = bench
        self._loaded = loaded
        self._output = output
        self._force = force
        self._allocation = Allocation({})
        self._stays = False
        self._dense_again = ExitStack()

    def prune(
        self, allocation: Allocation, pruner: Pruner, references: Sequence[Reference], clock: Clock
    ) -> list[Sums]:
        bench, self._allocation = self._bench, allocation
        with clock("prune"):
            pruned = bench.pruned(allocation, pruner, stays=lambda: self._stays)
            model = self._dense_again.enter_context(pruned)
        labels = ("Evaluating", "Evaluating on fitness tokens")
        with clock("evaluate"):
            return [
                each.total(model, progress=bench.progress, label=label)
                for each, label in zip(references, labels, strict=False)
            ]

    def pack(self) -> None:
        self._stays = True
        self._dense_again.close()
        for linear in self._bench.linears:
            if self._allocation[linear.name].is_dense:
                for module in linear.modules:
                    note_pattern(module, self._allocation[linear.name])
        if self._output is None:  # saving marks it too
            mark_packed(self._bench.model)
        give_back()  # saving takes memory too

    def save(self, recipe: Mapping[str, Any], clock: Clock) -> None:
        if self._output is None:
            return
        model, loaded = self._bench.model, self._loaded
        as_loaded = self._bench.structure.changes.undone(model)
        with clock("save"), as_loaded, as_stored(model, loaded.stored):
            save_packed(model, loaded.tokenizer, self._output, recipe=recipe, force=self._force, origin=loaded.folder)

    def __enter__(self) -> MemoryWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._dense_again.close()


@contextmanager
def block_writer(
    bench: StreamedWorkbench, loaded: LoadedModel, output: str | Path, *, force: bool, size: int
) -> Iterator[Writer]:
    """The writer of a streamed model; ``output`` is there when the context ends, and not before."""
    with packed_shards(output, loaded.stored, size, force=force, origin=loaded.folder) as shards:
        yield BlockWriter(bench, loaded, shards)


class BlockWriter:
    """A streamed model: each block is pruned, measured and stored before the next one is read."""

    def __init__(self, bench: StreamedWorkbench, loaded: LoadedModel, shards: Any) -> None:
        self._bench = bench
        self._loaded = loaded
        self._shards = shards
        self._allocation = Allocation({})

    def prune(
        self, allocation: Allocation, pruner: Pruner, references: Sequence[Reference], clock: Clock
    ) -> list[Sums]:
        self._allocation = allocation
        with clock("prune"):
            return self._bench.prune_blocks(self._shards.write, allocation, pruner, references)

    def pack(self) -> None:
        for linear in self._bench.linears:
            if self._allocation[linear.name].is_dense:
                for module in linear.modules:
                    note_pattern(module, self._allocation[linear.name])
        replace_linears(self._bench.model, self._bench.packed_on_no_device(self._allocation))

    def save(self, recipe: Mapping[str, Any], clock: Clock) -> None:
        with clock("save"):
            self._shards.finish(self._bench.model, self._loaded.tokenizer, recipe)
