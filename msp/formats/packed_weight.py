"""The packed form of an N:M sparse weight: the kept values, and one bit a weight that marks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.base.readable import dtype_name
from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.formats.positions import check_positions, count_bits, count_positions
from msp.formats.storage import BITMASK, VALUE_DTYPES, Storage, packed_widths

__all__ = [
    "VALUE_DTYPES",
    "CodedWeight",
    "PackedWeight",
    "check_matrix",
    "check_stored",
    "count_bits",
    "from_parts",
    "pack_bits",
    "quantise_values",
    "unpack",
    "unpack_bits",
]


def pack_bits(kept: Tensor) -> Tensor:
    """Bool ``[R, K]`` to uint8 ``[R, ceil(K/8)]``: column c is bit ``c % 8`` of byte ``c // 8``; bits past K are 0."""
    padded = F.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8))
    place = torch.arange(8, device=kept.device, dtype=torch.uint8)
    return (padded.view(len(kept), padded.shape[1] // 8, 8) << place).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack_bits``: bool ``[R, columns]``."""
    place = torch.arange(8, device=bitmask.device, dtype=torch.uint8)
    bits = (bitmask[:, :, None] >> place) & 1
    return bits.bool().flatten(1)[:, :columns]


def unpack(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """Dense ``[R, columns]``: the values in order at the set bits, zero elsewhere."""
    dense = values.new_zeros(values.shape[0], columns)
    return dense.masked_scatter(unpack_bits(bitmask, columns), values)


def check_matrix(name: str, weight: Tensor, group_size: int) -> None:
    """Raise unless ``weight`` is a ``[R, K]`` matrix that can be packed in groups of ``group_size``."""
    if weight.dtype not in VALUE_DTYPES:
        known = ", ".join(dtype_name(dtype) for dtype in VALUE_DTYPES)
        raise TypeError(f"{name} is {weight.dtype}, but must be one of {known}")
    if weight.ndim != 2:
        raise ValueError(f"{name} has shape {list(weight.shape)}, but must be a matrix [out, in]")
    if weight.shape[1] % group_size:
        raise ValueError(f"{name} has {weight.shape[1]} columns, but must have a multiple of {group_size}")


def check_stored(parts: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], name: str = "") -> None:
    """Raise ``MspError`` unless ``parts`` form a weight of ``shape`` in ``storage``; reads no bit of them.

    Args:
        name: the name of the weight, which starts the message.
    """
    prefix = f"{name}." if name else ""
    rows, columns = shape
    try:
        table = storage.packed_parts(rows, columns)
    except MspError as error:
        raise MspError(f"{prefix}shape {rows}x{columns}: {error}") from error
    if parts.keys() != table.keys():
        raise MspError(f"{prefix}parts are {', '.join(parts)}, but {storage} needs {', '.join(table)}")
    device = next(iter(parts.values())).device
    for label, part in table.items():
        found = parts[label]
        dtypes = VALUE_DTYPES if part.dtype is None else (part.dtype,)
        if found.dtype not in dtypes:
            *most, last = (dtype_name(dtype) for dtype in dtypes)
            needed = f"{', '.join(most)} or {last}" if most else last
            raise MspError(f"{prefix}{label} {'is' if label == BITMASK else 'are'} {found.dtype}, but must be {needed}")
        if found.shape != part.shape:
            raise MspError(f"{prefix}{label} has shape {list(found.shape)}, but {storage} needs {list(part.shape)}")
        if found.device != device:
            raise MspError(f"{prefix}{next(iter(table))} are on {device}, but {label} is on {found.device}")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """An N:M sparse ``[R, K]`` weight.

    Attributes:
        values: ``[R, K/M*N]``, the kept weights of each row in column order (fp32, fp16 or bf16).
        bitmask: uint8 ``[R, ceil(K/8)]``, bit ``c % 8`` of byte ``c // 8`` set if column c is kept: exactly N bits a
            group, also if a kept weight is 0; bits past K are 0.
        pattern: N:M; a text such as ``"2:8"`` becomes one.
        shape: ``(R, K)``, K a multiple of M.

    Raises:
        UsageError: a text that is no pattern.
    """

    values: Tensor
    bitmask: Tensor
    pattern: NMPattern
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, NMPattern):
            object.__setattr__(self, "pattern", NMPattern.of(self.pattern))

    @classmethod
    def from_mask(cls, weight: Tensor, mask: Tensor, pattern: NMPattern | str) -> PackedWeight:
        """Pack the weights of ``weight [R, K]`` at the set places of bool ``mask [R, K]``: exactly N of every M.

        Raises:
            TypeError: values or masks cannot have this dtype.
            ValueError: a shape does not fit, or a group has another number of kept weights.
            UsageError: a text that is no pattern.
        """
        pattern = NMPattern.of(pattern)
        check_matrix("weight", weight, pattern.m)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is {mask.dtype}, but must be bool")
        if mask.shape != weight.shape:
            raise ValueError(f"mask has shape {list(mask.shape)}, but weight has {list(weight.shape)}")
        rows, columns = weight.shape
        counts = mask.view(rows, columns // pattern.m, pattern.m).sum(-1)
        wrong = int((counts != pattern.n).sum())
        if wrong:
            raise ValueError(f"mask keeps another number than {pattern.n} in {wrong} of {counts.numel()} groups")
        values = weight.detach()[mask].view(rows, packed_widths(pattern.n, pattern.m, columns)[0])
        return cls(values, pack_bits(mask), pattern, (rows, columns))

    @property
    def storage(self) -> Storage:
        return Storage(self.pattern)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors by their names in ``Storage.packed_parts``."""
        return {"values": self.values, BITMASK: self.bitmask}

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and bitmask together, the same in memory and on disk."""
        return self.values.nbytes + self.bitmask.nbytes

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PackedWeight:
        """The same weight on another device, or with its values in another dtype."""
        if dtype is not None and dtype not in VALUE_DTYPES:
            raise TypeError(f"values cannot be {dtype}")
        values = self.values.to(device=device or self.device, dtype=dtype or self.dtype)
        if values is self.values and self.bitmask.device == values.device:
            return self
        return PackedWeight(values, self.bitmask.to(values.device), self.pattern, self.shape)

    def unpack(self) -> Tensor:
        """The dense ``[R, K]`` weight, with zeros for the weights that are not kept."""
        return unpack(self.values, self.bitmask, self.shape[1])

    def kept(self) -> Tensor:
        """Bool ``[R, K]``: true for the kept weights."""
        return unpack_bits(self.bitmask, self.shape[1])

    def check_once(self) -> None:
        """``check``, but a bitmask that was counted and has not changed is not counted again.

        Raises:
            MspError: as ``check``.
        """
        self.check_parts()
        check_positions(self.bitmask, self.pattern.n, self.pattern.m, self.shape[1])

    def check(self, name: str = "") -> None:
        """Raise ``MspError`` unless the parts fit together; kernels then do not count an unchanged bitmask again.

        Args:
            name: the tensor's name, which starts the message.
        """
        self.check_parts(name)
        count_positions(self.bitmask, self.pattern.n, self.pattern.m, self.shape[1], name)

    def check_parts(self, name: str = "") -> None:
        """``check`` without reading the bitmask, so it also serves tensors without data."""
        check_stored(self.parts, self.storage, self.shape, name)


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A ``[R, K]`` weight whose kept values are not floats; no kernel takes it, the reference unpacks it.

    Attributes:
        parts: the tensors of ``storage``, by name.
        storage: N:M with other values, like ``2:8+int8/64``.
        shape: ``(R, K)``.
    """

    parts: Mapping[str, Tensor]
    storage: Storage
    shape: tuple[int, int]

    @property
    def pattern(self) -> NMPattern:
        assert self.storage.support is not None
        return self.storage.support

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, the same in memory and on disk."""
        return sum(part.nbytes for part in self.parts.values())

    def to(self, device: torch.device | str) -> CodedWeight:
        """The same weight on another device."""
        return CodedWeight({name: part.to(device) for name, part in self.parts.items()}, self.storage, self.shape)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense ``[R, K]`` weight, with zeros for the weights that are not kept."""
        assert self.storage.values is not None
        values = self.storage.values.decode(self.parts, self.shape[1]).to(dtype)
        return unpack(values, self.parts[BITMASK], self.shape[1]) if BITMASK in self.parts else values

    def kept(self) -> Tensor:
        """Bool ``[R, K]``: true for the kept weights."""
        if BITMASK in self.parts:
            return unpack_bits(self.parts[BITMASK], self.shape[1])
        return torch.ones(self.shape, dtype=torch.bool, device=self.device)

    def check(self, name: str = "") -> None:
        """Raise ``MspError`` unless the parts fit together and the bitmask keeps N of every M.

        Args:
            name: the tensor's name, which starts the message.
        """
        check_stored(self.parts, self.storage, self.shape, name)
        if BITMASK in self.parts:
            count_positions(self.parts[BITMASK], self.pattern.n, self.pattern.m, self.shape[1], name)


def from_parts(parts: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int]) -> PackedWeight | CodedWeight:
    """The weight of ``shape`` that has ``parts``; call ``check`` to test whether they fit."""
    if storage.is_coded:
        return CodedWeight(dict(parts), storage, shape)
    assert storage.support is not None
    return PackedWeight(parts["values"], parts[BITMASK], storage.support, shape)


def quantise_values(packed: PackedWeight, values: str) -> CodedWeight:
    """The same weights, with the kept ones written as ``values``, such as ``int8/64``.

    Raises:
        UsageError: there is no such way to write values.
        MspError: a shape, a pattern or values that cannot be written in this way.
    """
    way = Storage.parse(values)
    if way.support is not None or way.values is None or not way.is_coded:
        raise UsageError(f"{values!r} is no way to write values; int8/64 is one")
    storage = Storage(packed.pattern, way.values)
    table = storage.packed_parts(*packed.shape)
    parts = {**way.values.encode(packed.values.detach(), packed.shape[1]), BITMASK: packed.bitmask}
    return CodedWeight({name: parts[name] for name in table}, storage, packed.shape)
