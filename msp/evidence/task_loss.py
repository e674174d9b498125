"""The user's own loss as the fitness that a search minimises."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from msp.errors import MspError, UsageError
from msp.evidence.evaluate import Reference, Sums

TaskLoss = Callable[[Tensor, Tensor], Tensor | float]
"""``loss(logits, tokens)`` returns one number from fp32 ``[B, T, V]`` and int64 ``[B, T]`` on one device.

``logits[:, t]`` predicts ``tokens[:, t + 1]``. The loss is the sum, not the mean, over the predicted tokens of the
batch, so that batches add up; a lower loss is better. It gets the same batches for every candidate, and must depend on
its arguments alone. To run in other processes it must be picklable, for example a function of a module.
"""


def load_task_loss(text: str) -> TaskLoss:
    """The callable that ``"package.module:function"`` names; modules in the current directory are found.

    Raises:
        UsageError: the module is absent or does not have that name, or the object cannot be called.
    """
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        loss = importlib.import_module(module_name)
        for part in name.split("."):
            loss = getattr(loss, part)
    except Exception as error:  # any error that the user's module raises when it is imported
        raise UsageError(f"fitness {text}: {type(error).__name__}: {error}") from error
    if not callable(loss):
        raise UsageError(f"fitness {text} is a {type(loss).__name__}, not a function of logits and tokens")
    return loss


def fitness_name(fitness: str | TaskLoss) -> str:
    """The name of a fitness: ``kl``, ``perplexity``, or ``module:function`` for a user's loss."""
    if isinstance(fitness, str):
        return fitness
    named: Any = fitness if hasattr(fitness, "__qualname__") else type(fitness)
    return f"{named.__module__}:{named.__qualname__}"


class TaskReference(Reference):
    """Measures models by ``loss`` on ``windows``, int64 ``[S, T]``; it replaces ``DenseReference``."""

    def __init__(self, windows: Tensor, loss: TaskLoss, *, batch_size: int) -> None:
        super().__init__(windows, batch_size)
        self.loss = loss

    def compare(self, batch: int, logits: Tensor) -> Sums:
        """The summed loss of a model that returns ``logits [B, T, V]`` for the batch."""
        tokens, logits = self.tokens(batch).to(logits.device), logits.float()
        try:
            loss = float(self.loss(logits, tokens))
        except Exception as error:
            raise MspError(f"fitness {fitness_name(self.loss)}: {type(error).__name__}: {error}") from error
        return Sums(loss, predicted=tokens[:, 1:].numel(), tokens=tokens.numel())
