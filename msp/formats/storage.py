"""How a linear is stored: which weights exist (support) times how each is written (values). Integers, no tensors.

``2:8`` keeps 2 of every 8 weights in the model's own dtype, ``dense`` all of them, ``removed`` stores nothing at all.
``2:8+int8/64`` and ``int8/64`` write the kept weights in another way, see ``register_values``. ``Storage.parts`` is the
one table of the tensors that a linear has on disk: all code that needs their names, shapes, dtypes or bytes reads it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch

from msp.base.reading import shown
from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern

if TYPE_CHECKING:
    from torch import Tensor

# The dtypes of weights, as safetensors spells them. A model's packed values are in one of ``VALUE_DTYPES``.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The name of the part that marks the kept weights, a bit each.
BITMASK = "bitmask"


class Part(NamedTuple):
    """A tensor of a stored linear; ``dtype`` is None if it is the model's own."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes, in a model of ``dtype``."""
        return math.prod(self.shape) * (self.dtype or dtype).itemsize


@dataclass(frozen=True)
class Values(ABC):
    """A way of writing kept weights.

    A new way derives from this class, and is found by its word after ``register_values``.
    """

    # The names of the tensors of ``parts`` for every size.
    names: ClassVar[tuple[str, ...]]

    @classmethod
    def parse(cls, word: str) -> Values | None:
        """The values that ``word``, such as ``int8/64``, names; None if it is a word of another class."""
        return None

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def is_built(self) -> bool:
        """Whether ``encode`` and ``decode`` are implemented; without them only the sizes are defined."""
        return True

    def check(self, support: NMPattern | None, columns: int | None = None) -> None:
        """Raise ``MspError`` if weights of ``support`` cannot be written in this way, in a row of ``columns``."""
        return None  # by default all can

    @abstractmethod
    def parts(self, rows: int, columns: int, kept: int) -> dict[str, Part]:
        """The tensors of ``kept`` weights in each of ``rows`` rows, which have ``columns`` when dense."""

    def encode(self, values: Tensor, columns: int) -> dict[str, Tensor]:
        """The tensors of ``parts`` from the kept weights ``[R, kept]`` in column order.

        Raises:
            MspError: the weights cannot be written in this way.
        """
        raise MspError(f"weights cannot be written as {self} yet")

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        """The kept weights ``[R, kept]`` in float32, from the tensors of ``parts``.

        Raises:
            MspError: the tensors cannot be read.
        """
        raise MspError(f"weights written as {self} cannot be read yet")


@dataclass(frozen=True)
class FloatValues(Values):
    """Every kept weight in the model's own dtype, in column order."""

    names: ClassVar[tuple[str, ...]] = ("values",)

    def __str__(self) -> str:
        return "float"

    def parts(self, rows: int, columns: int, kept: int) -> dict[str, Part]:
        return {"values": Part((rows, kept), None)}


FLOAT = FloatValues()
V = TypeVar("V", bound=Values)
_ways: list[type[Values]] = []


def register_values(way: type[V]) -> type[V]:
    """Register ``way``, so that ``Storage.parse`` finds it by its words."""
    _ways.append(way)
    return way


def part_names() -> frozenset[str]:
    """The names that tensors of packed linears may have."""
    return frozenset({BITMASK, *FloatValues.names, *(name for way in _ways for name in way.names)})


@dataclass(frozen=True)
class Storage:
    """How a linear ``[R, K]`` is stored.

    Attributes:
        support: the weights that exist, N of every M; None for all of them, for any K.
        values: the way of writing each weight; None if the linear is removed.
    """

    support: NMPattern | None = None
    values: Values | None = FLOAT

    def __post_init__(self) -> None:
        if self.values is None and self.support is not None:
            raise UsageError(f"a removed linear has no pattern, but {self.support} was given")
        if self.values is not None:
            self.values.check(self.support)

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Read what ``str`` writes: ``2:8``, ``int8/64``, ``2:8+int8/64``, ``dense`` or ``removed``.

        Raises:
            UsageError: the text is none of these.
        """
        word = text.strip()
        if word in _WORDS:
            return _WORDS[word]
        if "+" not in word and ":" in word:
            return cls(NMPattern.parse(word))
        support, plus, values = word.rpartition("+")
        ways = (way.parse(values) for way in _ways)
        found = next((way for way in ways if way is not None), None)
        if found is None:
            raise UsageError(f"{shown(text)} is no storage; write N:M, dense or, with other values, like 2:8+int8/64")
        return cls(NMPattern.parse(support) if plus else None, found)

    def __str__(self) -> str:
        if self.values is None:
            return "removed"
        if not self.is_coded:
            return "dense" if self.support is None else str(self.support)
        return str(self.values) if self.support is None else f"{self.support}+{self.values}"

    @property
    def keeps_all(self) -> bool:
        """Whether every weight exists, so that no part has to mark the kept ones."""
        return self.values is not None and (self.support is None or self.support.is_dense)

    @property
    def is_coded(self) -> bool:
        """Whether values are written in another way than the model's dtype."""
        return self.values is not None and self.values != FLOAT

    @property
    def is_dense(self) -> bool:
        """Whether the linear is stored as the plain weight. This is also true for ``8:8``, which keeps all weights."""
        return self.keeps_all and not self.is_coded

    @property
    def label(self) -> str:
        """``str``, but ``dense`` for every dense storage: the key of tables that do not distinguish them."""
        return "dense" if self.is_dense else str(self)

    @property
    def order(self) -> tuple[int, int, str]:
        """The sort key in a list of storages: by M, then by N."""
        return (self.support.m, self.support.n, str(self.values)) if self.support else (0, 0, str(self))

    def check(self, columns: int) -> None:
        """Raise ``MspError`` unless a linear of ``columns`` input features can be stored in this way."""
        if self.support is not None and columns % self.support.m:
            raise MspError(f"{columns} columns are not a multiple of the group size {self.support.m}")
        if self.values is not None:
            self.values.check(self.support, columns)

    def kept(self, rows: int, columns: int) -> int:
        """The number of weights that exist.

        Raises:
            MspError: ``columns`` does not fit.
        """
        self.check(columns)
        if self.values is None:
            return 0
        return rows * columns if self.support is None else self.support.kept(rows, columns)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Name, shape and dtype of each tensor that stores a ``[rows, columns]`` linear.

        Raises:
            MspError: ``columns`` does not fit.
        """
        if self.is_dense:
            self.check(columns)
            return {"weight": Part((rows, columns), None)}
        return self.packed_parts(rows, columns)

    def packed_parts(self, rows: int, columns: int) -> dict[str, Part]:
        """``parts`` as ops take them: an op for any N:M reads a bitmask for float values of M:M too.

        Raises:
            MspError: ``columns`` does not fit.
        """
        if self.values is None:
            return {}
        parts = self.values.parts(rows, columns, self.kept(1, columns))
        if not (self.keeps_all and self.is_coded):
            parts[BITMASK] = Part((rows, -(-columns // 8)), torch.uint8)
        return parts

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Bytes of all parts of a ``[rows, columns]`` linear in a model of ``dtype``."""
        return sum(part.nbytes(dtype) for part in self.parts(rows, columns).values())

    def bits_per_weight(self, rows: int, columns: int, dtype: torch.dtype) -> float:
        """Bits of all parts, divided by the number of weights of the dense linear; 0 if there are none."""
        return 8 * self.nbytes(rows, columns, dtype) / max(rows * columns, 1)


@functools.lru_cache(maxsize=4096)
def packed_widths(n: int, m: int, columns: int) -> tuple[int, int]:
    """Elements in a row of the values and of the bitmask that ops take for N:M; cached, because every product calls it.

    Raises:
        UsageError: there is no such pattern.
        MspError: ``columns`` does not fit.
    """
    parts = Storage(NMPattern(n, m)).packed_parts(1, columns)
    return parts["values"].shape[1], parts[BITMASK].shape[1]


DENSE = Storage()
REMOVED = Storage(values=None)
_WORDS = {str(storage): storage for storage in (DENSE, REMOVED)}
