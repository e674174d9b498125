"""What every recovery method has: the parameters that it trains, its phases, and its merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from msp.base.progress import Progress
from msp.base.registry import Factory, Registry
from msp.errors import UsageError
from msp.evidence.evaluate import DenseReference
from msp.formats.patterns import NMPattern
from msp.models.as_loaded import StoredDtypes
from msp.models.structure import Structure
from msp.packed.sparse_linear import SparseLinear
from msp.recovery.loss import LossWeights

Parameters = Mapping[str, nn.Parameter]
"""Parameters by their names in the model; a parameter that has several names is here once."""


@dataclass(frozen=True)
class Task:
    """A pruned model, the dense model that teaches it, and the text.

    Attributes:
        student: the packed model; its parameters are fp32 on ``device``.
        teacher: the dense model on ``device``.
        structure: the blocks of the teacher. The blocks of the student have the same names.
        batches: the training tokens, int64 ``[B, T]`` for each forward.
        held_out: the held-out tokens, int64 ``[B, T]`` for each forward.
        reference: the predictions of the teacher on the held-out tokens.
        weights: the weights of the loss.
        stored: the dtypes in which the student is stored.
        device: the device on which the models run.
        hidden_bytes: the memory for hidden states; further states go to temporary files.
        progress: the progress display.
    """

    student: Any
    teacher: Any
    structure: Structure
    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    reference: DenseReference
    weights: LossWeights
    stored: StoredDtypes
    device: torch.device
    hidden_bytes: int
    progress: Progress

    def held_out_loss(self) -> float:
        """The loss of the student on the held-out tokens, in nats per predicted token."""
        total = self.reference.total(self.student, progress=self.progress, label="Held-out loss")
        return self.weights.of(total)


@dataclass(frozen=True)
class Phase:
    """One training run of a method; a method has one or several of them, one after the other.

    Attributes:
        name: the name of the phase in the progress display.
        parameters: the parameters that the phase trains.
        loss: returns the loss on the batch with a number, a scalar with a gradient.
        measure: returns the held-out loss of the current parameters; it decides which of them are kept.
    """

    name: str
    parameters: Parameters
    loss: Callable[[int], Tensor]
    measure: Callable[[], float]


class Recovery(Protocol):
    """A recovery method. It changes no mask and no dtype; the files of the model keep their sizes.

    Attributes:
        name: what users call it.
        learning_rate: the highest learning rate of AdamW.
    """

    @property
    def name(self) -> str: ...

    @property
    def learning_rate(self) -> float: ...

    def parameters(self, model: nn.Module) -> Parameters:
        """The parameters of the packed ``model`` that the method trains."""
        ...

    def phases(self, task: Task) -> Iterator[Phase]:
        """The phases. The caller trains each of them before it draws the next one."""
        ...

    def merge(self, model: nn.Module) -> None:
        """Bring all that was trained beside the parameters of ``model`` into them."""
        ...


class DirectRecovery:
    """The common part of methods that train the parameters of the model itself, so that there is nothing to merge."""

    learning_rate: float

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"a learning rate of {self.learning_rate} is not a finite number above 0")

    def merge(self, model: nn.Module) -> None:
        pass


RECOVERIES: Registry[Recovery] = Registry("recovery method", ("name", "learning_rate", "parameters", "phases", "merge"))


def register_recovery(factory: Factory) -> Factory:
    """Register a method under its attribute ``name``; see ``Registry.register``."""
    return RECOVERIES.register(factory)


def get_recovery(name: str | Recovery, **options: Any) -> Recovery:
    """The recovery method ``name``, made with ``options``; see ``Registry.get``."""
    return RECOVERIES.get(name, **options)


def kept_values(model: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """The values of every packed linear of ``model``, and the weights of linears whose pattern keeps everything.

    Args:
        prefix: the name of ``model`` in the whole model, with a dot at its end.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            values = module._parameters.get("values")
            if values is not None and values.numel():
                found[f"{prefix}{name}.values"] = values
        elif isinstance(getattr(module, "pattern", None), NMPattern):
            weight = module.get_parameter("weight")
            found[f"{prefix}{name}.weight"] = weight
    return distinct(found)


def vectors(model: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """The parameters of one dimension: norms, biases and scales."""
    return {f"{prefix}{name}": each for name, each in model.named_parameters() if each.ndim == 1 and each.numel()}


def distinct(parameters: Parameters, without: Parameters | None = None) -> dict[str, nn.Parameter]:
    """``parameters``, each once, except those in ``without``."""
    seen = {id(parameter) for parameter in (without or {}).values()}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


@contextmanager
def in_rows(model: nn.Module) -> Iterator[None]:
    """Within the context all packed linears are in rows and stay so if the model is moved, so that they can be trained.

    They get the fastest layout of their device afterwards.
    """
    sparse = [each for each in model.modules() if isinstance(each, SparseLinear) and not each.storage.is_coded]
    before = [module.values.requires_grad for module in sparse]
    try:
        for module in sparse:
            module.values.requires_grad_(True)
            module.settle()
        yield
    finally:
        for module, required in zip(sparse, before, strict=True):
            module.values.requires_grad_(required)
            module.settle()


@contextmanager
def training(model: nn.Module, parameters: Parameters) -> Iterator[None]:
    """Within the context only ``parameters`` of ``model`` require gradients."""
    trained = {id(parameter) for parameter in parameters.values()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in trained)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


@contextmanager
def as_saved(parameters: Parameters, stored: StoredDtypes) -> Iterator[None]:
    """Within the context the parameters have the values that their files will have, rounded to the stored dtypes."""
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(stored.of(name)).to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def snapshot(parameters: Parameters) -> dict[str, Tensor]:
    """Copies of the parameters in host memory."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def put(parameters: Parameters, values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into the parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
