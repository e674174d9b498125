"""The packed form of an N:M sparse weight: kept values and one bit a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from msp.errors import MspError
from msp.patterns import NMPattern

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack_bits(kept: Tensor) -> Tensor:
    """bool ``[R, K]`` -> uint8 ``[R, ceil(K/8)]``: bit ``c % 8`` of byte ``c // 8`` is column c."""
    rows, columns = kept.shape
    bits = functional.pad(kept, (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, columns: int) -> Tensor:
    """uint8 ``[R, ceil(K/8)]`` -> bool ``[R, K]``."""
    places = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask[..., None] >> places) & 1).flatten(-2)[..., :columns].bool()


def unpack_dense(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """The dense weight ``[R, K]`` with zeros where nothing is kept."""
    dense = values.new_zeros(values.shape[0], columns)
    return dense.masked_scatter_(unpack_bits(bitmask, columns), values)


@dataclass(frozen=True)
class PackedWeight:
    """An N:M sparse weight ``[R, K]``, K a multiple of M.

    Attributes:
        values: ``[R, K/M*N]``, the kept weights of each row in column order; float32, float16 or bfloat16.
        bitmask: uint8 ``[R, ceil(K/8)]``; bit ``c % 8`` of byte ``c // 8`` is set where column c is kept, N
            bits in every group of M, none behind column K.
        pattern: N:M, N kept.
        shape: ``(R, K)``.
    """

    values: Tensor
    bitmask: Tensor
    pattern: NMPattern
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, weight: Tensor, kept: Tensor, pattern: NMPattern) -> PackedWeight:
        """Pack ``weight [R, K]`` where ``kept`` (bool ``[R, K]``) is set; exactly N of every group must be.

        Raises:
            ValueError: shapes differ, K is not a multiple of M, or a group keeps another number.
        """
        rows, columns = check_weight("PackedWeight", weight, pattern)
        if kept.shape != weight.shape or kept.dtype != torch.bool:
            raise ValueError(
                f"PackedWeight: the mask is {kept.dtype} {list(kept.shape)}, needed is torch.bool {[rows, columns]}"
            )
        counts = kept.view(rows, columns // pattern.m, pattern.m).sum(-1)
        wrong = int((counts != pattern.n).sum())
        if wrong:
            raise ValueError(f"PackedWeight: {wrong} groups of the mask do not keep {pattern}")
        values = weight.masked_select(kept).view(rows, columns // pattern.m * pattern.n)
        return cls(values, pack_bits(kept), pattern, (rows, columns))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and bitmask."""
        return self.values.nbytes + self.bitmask.nbytes

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PackedWeight:
        """The same weight elsewhere or in another dtype (of the values; the bitmask stays uint8)."""
        values = self.values.to(device=device, dtype=dtype)
        return PackedWeight(values, self.bitmask.to(device=device), self.pattern, self.shape)

    def kept(self) -> Tensor:
        """bool ``[R, K]``: which weights are kept."""
        return unpack_bits(self.bitmask, self.shape[1])

    def unpack(self) -> Tensor:
        """The dense weight ``[R, K]``."""
        return unpack_dense(self.values, self.bitmask, self.shape[1])

    def check(self, name: str = "packed weight") -> None:
        """Raise ``MspError`` naming the tensor unless shapes, dtypes and the bits of every group are right."""
        rows, columns = self.shape
        m, n = self.pattern.m, self.pattern.n
        if columns % m:
            raise MspError(f"{name}: {columns} columns are not a multiple of the group size {m}")
        if self.values.dtype not in DTYPES:
            raise MspError(f"{name}.values: dtype {self.values.dtype}, needed is float32, float16 or bfloat16")
        if self.bitmask.dtype != torch.uint8:
            raise MspError(f"{name}.bitmask: dtype {self.bitmask.dtype}, needed is torch.uint8")
        for part, tensor, needed in (
            ("values", self.values, [rows, columns // m * n]),
            ("bitmask", self.bitmask, [rows, -(-columns // 8)]),
        ):
            if list(tensor.shape) != needed:
                raise MspError(f"{name}.{part}: shape {list(tensor.shape)}, needed is {needed}")
        if self.bitmask.device != self.values.device:
            raise MspError(f"{name}.bitmask: on {self.bitmask.device}, the values on {self.values.device}")
        bits = unpack_bits(self.bitmask, self.bitmask.shape[1] * 8)
        if bits[:, columns:].any():
            raise MspError(f"{name}.bitmask: bits are set behind column {columns}")
        wrong = (bits[:, :columns].reshape(rows, columns // m, m).sum(-1) != n).nonzero()
        if len(wrong):
            row, group = wrong[0].tolist()
            raise MspError(
                f"{name}.bitmask: {len(wrong)} groups do not keep {self.pattern}, the first at row {row}, group {group}"
            )


def check_weight(op: str, weight: Tensor, pattern: NMPattern) -> tuple[int, int]:
    """``(R, K)`` of a float weight whose K is a multiple of M; ``TypeError`` or ``ValueError`` otherwise."""
    if weight.dtype not in DTYPES:
        raise TypeError(f"{op}: weight is {weight.dtype}, needed is float32, float16 or bfloat16")
    if weight.ndim != 2 or weight.shape[1] % pattern.m:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, needed is [R, K] with K a multiple of {pattern.m}"
        )
    return weight.shape[0], weight.shape[1]
