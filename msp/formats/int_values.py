"""Kept weights as integers with a scale for each group of columns: ``int8/64``. In plain torch, the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.formats.storage import Part, Values, register_values

BITS = (8, 4, 3, 2)
GROUPS = (32, 64, 128)


@register_values
@dataclass(frozen=True)
class IntValues(Values):
    """Symmetric integers of ``bits``, and one fp16 scale for the kept weights of every ``group`` dense columns.

    A weight is its code times its scale. Only 8 bits can be computed; the other widths only have sizes.
    """

    names: ClassVar[tuple[str, ...]] = ("codes", "scales")
    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group not in GROUPS:
            bits, groups = (", ".join(map(str, known)) for known in (BITS, GROUPS))
            raise UsageError(f"{self} is not a way to write values: bits are one of {bits}, a group one of {groups}")

    @classmethod
    def parse(cls, word: str) -> IntValues | None:
        match = re.fullmatch(r"int([0-9]{1,3})/([0-9]{1,6})", word)
        return None if match is None else cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"int{self.bits}/{self.group}"

    @property
    def is_built(self) -> bool:
        return self.bits == 8

    def check(self, support: NMPattern | None, columns: int | None = None) -> None:
        if support is not None and self.group % support.m:
            raise UsageError(f"a group of {self.group} is not a multiple of the group size of {support}")
        if columns is not None and columns % self.group:
            raise MspError(f"{columns} columns are not a multiple of the {self.group} that share a scale")

    def parts(self, rows: int, columns: int, kept: int) -> dict[str, Part]:
        packed = [2, 1] if self.bits == 3 else [self.bits]  # 3 bits are a plane of two and a plane of one
        width = sum(-(-kept * bits // 8) for bits in packed)
        codes = torch.int8 if self.bits == 8 else torch.uint8
        scales = Part((rows, columns // self.group), torch.float16)
        return {"codes": Part((rows, width), codes), "scales": scales}

    def encode(self, values: Tensor, columns: int) -> dict[str, Tensor]:
        self._require()
        top = 2 ** (self.bits - 1) - 1
        grouped = self._grouped(values.float(), columns)
        largest = grouped.abs().amax(-1) if grouped.shape[-1] else grouped.new_zeros(grouped.shape[:-1])
        scales = (largest / top).half()
        if not torch.isfinite(scales).all():
            limit = top * torch.finfo(torch.float16).max
            raise MspError(f"weights up to {float(largest.max()):g} have no {self} scale: {limit:g} is the most")
        # a scale that fp16 rounds to zero leaves codes of zero
        steps = torch.where(scales == 0, torch.inf, scales.float())
        codes = (grouped / steps[..., None]).round().clamp(-top, top)
        return {"codes": codes.flatten(1).to(torch.int8), "scales": scales}

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        self._require()
        grouped = self._grouped(parts["codes"].float(), columns)
        return (grouped * parts["scales"].float()[..., None]).flatten(1)

    def _grouped(self, values: Tensor, columns: int) -> Tensor:
        """``[R, groups, kept in a group]``: all groups keep as many, since they are whole groups of the support."""
        groups = columns // self.group
        return values.reshape(len(values), groups, values.shape[1] // max(groups, 1))

    def _require(self) -> None:
        if not self.is_built:
            raise UsageError(f"{self} values are not built, only their sizes: int8/{self.group} is")
