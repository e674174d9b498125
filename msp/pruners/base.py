"""The interface of pruners, the statistics that they can ask for, and their registry.

A new pruner takes a few lines::

    @register_pruner
    @dataclass(frozen=True)
    class Activation(KeepingPruner):
        name: ClassVar[str] = "activation"
        needs: ClassVar[frozenset[str]] = frozenset({"input_sum_squares"})

        def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
            norms = self.require(statistics, "input_sum_squares", weight.shape[1:]).sqrt()
            return Scoring(scores=norms.expand(weight.shape))
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from msp import ops
from msp.base.registry import Registry
from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight

# Where messages go: to a function, or to ``warnings`` if it is None.
Warn = Callable[[str], object] | None


@dataclass
class LinearStatistics:
    """The statistics of one linear ``[R, K]`` from calibration and sensitivity; None if they were not collected."""

    tokens: int = 0
    """The number of tokens that ``input_sum_squares`` and ``hessian`` sum over."""
    input_sum_squares: Tensor | None = None
    """fp32 ``[K]``: sum over tokens of x^2."""
    hessian: Tensor | None = None
    """fp32 ``[K, K]``: sum over tokens of x x^T, neither averaged nor damped."""
    fisher: Tensor | None = None
    """fp32 ``[R, K]``: sum over sequences of the squared gradient of the sequence's loss."""
    sequences: int = 0
    """The number of sequences that ``fisher`` sums over."""

    def say_nothing(self, needs: frozenset[str]) -> bool:
        """Whether all weights would get the same score: no token was seen, or a statistic in ``needs`` is all zero."""
        found = (getattr(self, name) for name in needs)
        return not self.tokens or any(tensor is not None and not bool(tensor.any()) for tensor in found)


STATISTICS = frozenset({"input_sum_squares", "hessian", "fisher"})


@dataclass(frozen=True)
class Scoring:
    """The score of the weights, as arguments of ``ops.nm_select``; without arguments it is ``|w|``."""

    column_scale: Tensor | None = None
    row_term: Tensor | None = None
    column_term: Tensor | None = None
    importance: Tensor | None = None
    scores: Tensor | None = None

    def kwargs(self) -> dict[str, Any]:
        """The scoring arguments for ``nm_select`` and ``nm_rank``."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in given if tensor is not None}


class Pruner(Protocol):
    """Decides which weights of a linear are kept. Any object with these attributes can serve, derived or not."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    """The fields of ``LinearStatistics`` that the pruner reads, a subset of ``STATISTICS``."""
    updates_weights: ClassVar[bool]
    """Whether the kept weights get new values."""

    @abstractmethod
    def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
        """The score that ranks the weights of a group; ``weight`` is ``[R, K]`` of any float dtype."""

    @abstractmethod
    def prune(
        self, weight: Tensor, statistics: LinearStatistics, pattern: NMPattern, *, name: str = "", warn: Warn = None
    ) -> PackedWeight:
        """Prune ``weight [R, K]``; messages name the linear ``name`` and go to ``warn``, or else to ``warnings``."""

    def prune_levels(
        self,
        weight: Tensor,
        statistics: LinearStatistics,
        patterns: Sequence[NMPattern],
        *,
        name: str = "",
        warn: Warn = None,
    ) -> Iterator[PackedWeight]:
        """The results of ``prune`` for each of ``patterns``; a pruner may compute common parts of them once."""
        for pattern in patterns:
            yield self.prune(weight, statistics, pattern, name=name, warn=warn)


class BasePruner(Pruner):
    """A base class with the look-up of statistics; its use is optional."""

    needs: ClassVar[frozenset[str]] = frozenset()
    updates_weights: ClassVar[bool] = False

    def require(self, statistics: LinearStatistics, field: str, shape: Sequence[int]) -> Tensor:
        """The field ``field`` of ``statistics``.

        Raises:
            MspError: the field was not collected, or does not have ``shape``.
        """
        tensor: Tensor | None = getattr(statistics, field)
        if tensor is None:
            raise MspError(f"pruner {self.name!r} needs the statistic {field!r}, which was not gathered")
        if tensor.shape != torch.Size(shape):
            raise MspError(
                f"pruner {self.name!r}: statistic {field!r} has shape {list(tensor.shape)}, needed is {list(shape)}"
            )
        return tensor


class KeepingPruner(BasePruner):
    """A pruner that does not change the kept weights, so that its scoring defines it."""

    def prune(
        self, weight: Tensor, statistics: LinearStatistics, pattern: NMPattern, *, name: str = "", warn: Warn = None
    ) -> PackedWeight:
        with named(name):
            return ops.nm_select(weight, pattern, **self.scoring(weight, statistics).kwargs())


class named:
    """Puts the linear's name before the message of a ``ValueError`` raised inside."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._name and isinstance(error, ValueError) and not str(error).startswith(f"{self._name}: "):
            raise MspError(f"{self._name}: {error}") from error


def tell(warn: Warn, message: str) -> None:
    """Pass ``message`` to ``warn``, or issue a Python warning if ``warn`` is None."""
    if warn is None:
        warnings.warn(message, stacklevel=3)
    else:
        warn(message)


PRUNERS: Registry[Pruner] = Registry("pruner", ("name", "needs", "updates_weights", "scoring", "prune", "prune_levels"))

register_pruner = PRUNERS.register
get_pruner = PRUNERS.get


def pruner_names() -> tuple[str, ...]:
    """The names of all registered pruners, sorted."""
    return PRUNERS.names
