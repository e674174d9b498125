"""A loss of the user's own as what a search minimises."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from msp.errors import MspError, UsageError
from msp.evaluate import Reference, Sums

TaskLoss = Callable[[Tensor, Tensor], Tensor | float]
"""``loss(logits, tokens)``: fp32 ``[B, T, V]`` and int64 ``[B, T]``, on one device, to one number.

``logits[:, t]`` predicts ``tokens[:, t + 1]``. The loss is summed, not averaged, over what the batch predicts, so that
batches add up; lower is better. It sees the same batches for every candidate and must depend on its arguments alone. To
run in other processes it must be picklable, as a function of a module is.
"""


def load_task_loss(text: str) -> TaskLoss:
    """The callable that ``"package.module:function"`` names; modules in the current directory are found.

    Raises:
        UsageError: there is no such module, nothing of that name in it, or what is there cannot be called.
    """
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        loss = importlib.import_module(module_name)
        for part in name.split("."):
            loss = getattr(loss, part)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise UsageError(f"fitness {text}: {type(error).__name__}: {error}") from error
    if not callable(loss):
        raise UsageError(f"fitness {text} is a {type(loss).__name__}, not a function of logits and tokens")
    return loss


def fitness_name(fitness: str | TaskLoss) -> str:
    """``kl``, ``perplexity``, or where a loss of the user's comes from: ``module:function``."""
    if isinstance(fitness, str):
        return fitness
    named: Any = fitness if hasattr(fitness, "__qualname__") else type(fitness)
    return f"{named.__module__}:{named.__qualname__}"


class TaskReference(Reference):
    """Measures models by ``loss``, in the place of ``DenseReference``, on ``windows`` int64 ``[S, T]``."""

    def __init__(self, windows: Tensor, loss: TaskLoss, *, batch_size: int) -> None:
        super().__init__(windows, batch_size)
        self.loss = loss

    def compare(self, batch: int, logits: Tensor) -> Sums:
        """Summed loss of a model that has ``logits [B, T, V]`` for a batch."""
        tokens, logits = self.tokens(batch).to(logits.device), logits.float()
        try:
            loss = float(self.loss(logits, tokens))
        except Exception as error:
            raise MspError(f"fitness {fitness_name(self.loss)}: {type(error).__name__}: {error}") from error
        return Sums(loss, predicted=tokens[:, 1:].numel(), tokens=tokens.numel())
