"""Norms and biases only: the cheapest recovery, which touches no packed value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from msp.recovery.base import DirectRecovery, Parameters, Phase, Task, register_recovery, vectors
from msp.recovery.distil import end_to_end


@register_recovery
@dataclass(frozen=True)
class Norms(DirectRecovery):
    """Training of the parameters of one dimension with the loss of ``distil`` (PERP, 2312.15230)."""

    name: ClassVar[str] = "norms"
    learning_rate: float = 1e-3

    def parameters(self, model: nn.Module) -> Parameters:
        return vectors(model)

    def phases(self, task: Task) -> Iterator[Phase]:
        yield end_to_end(task, "Training norms", self.parameters(task.student))
