"""The choice of the runner of candidates, for the search and for each of its workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msp.base.progress import NoProgress, Progress
from msp.compressions.base import Compression
from msp.engine.candidates import HIDDEN_BYTES, CandidateModel, LocalRunner
from msp.engine.fitness import Runner
from msp.evidence.evaluate import Reference
from msp.models.structure import Structure
from msp.plan.budget import Unit

if TYPE_CHECKING:
    from msp.engine.distributed import Workers


@dataclass(frozen=True)
class Setting:
    """The inputs of a runner: the dense model, the compression, the units and the reference."""

    model: Any
    structure: Structure
    compression: Compression
    units: Sequence[Unit]
    reference: Reference
    hidden_bytes: int = HIDDEN_BYTES


@contextmanager
def open_runner(setting: Setting, workers: Workers | None = None, progress: Progress | None = None) -> Iterator[Runner]:
    """Yield a runner in this process, or one that sends jobs to ``workers``; afterwards the model is dense again."""
    if workers is not None:
        from msp.engine.distributed import ray_runner

        with ray_runner(setting, workers, progress or NoProgress()) as runner:
            yield runner
    else:
        structure = setting.structure
        with CandidateModel(setting.model, structure, setting.compression, setting.units) as candidates:
            yield LocalRunner(candidates, setting.reference, structure, hidden_bytes=setting.hidden_bytes)
