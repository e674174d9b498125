"""End to end: all kept values, norms and biases learn to predict what the dense model predicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from msp.evidence.head import Forward
from msp.recovery.base import DirectRecovery, Parameters, Phase, Task, distinct, kept_values, register_recovery, vectors
from msp.recovery.loss import distillation_loss


def end_to_end(task: Task, name: str, parameters: Parameters) -> Phase:
    """The phase that trains ``parameters`` with the loss of the whole model."""
    student, teacher = (Forward(model, task.batches[0]) for model in (task.student, task.teacher))

    def loss(batch: int) -> Tensor:
        tokens = task.batches[batch]
        dense = None
        if task.weights.kl:
            with torch.no_grad():
                dense = teacher(tokens)
        return distillation_loss(student(tokens), dense, tokens, task.weights)

    return Phase(name, parameters, loss, task.held_out_loss)


@register_recovery
@dataclass(frozen=True)
class Distil(DirectRecovery):
    """Distillation under the fixed mask, as the last part of AST (Adaptive Sparse Trainer, AAAI 2025).

    It trains the kept values of all packed linears, the weights of linears whose pattern keeps everything, norms and
    biases. Embeddings and the output head stay as they are.
    """

    name: ClassVar[str] = "distil"
    learning_rate: float = 1e-3

    def parameters(self, model: nn.Module) -> Parameters:
        return distinct({**kept_values(model), **vectors(model)})

    def phases(self, task: Task) -> Iterator[Phase]:
        yield end_to_end(task, "Distilling", self.parameters(task.student))
