"""What the ``config.json`` of a packed model says about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from msp import __version__
from msp.errors import MspError
from msp.hashes import read_hashes
from msp.patterns import NMPattern
from msp.reading import plain, shown, table, text

FORMAT = 1
QUANT_METHOD = "msp"
# The dtypes that weights are stored in, as safetensors spells them; packed values are in one of the first three.
WEIGHT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
VALUE_DTYPES = ("F32", "F16", "BF16")
TABLES = ("allocation", "shapes", "shared", "recipe", "versions", "hashes")
LARGEST_SIZE = 1 << 31


@dataclass(frozen=True)
class Manifest:
    """What ``config.json`` says about a packed model: patterns, ``[out, in]`` shapes, recipe, versions.

    A weight that stands at several places is stored once, under the name of the first one. ``shared`` names the others,
    and for each the first one. ``hashes`` are those of all stored tensors by name, see ``msp.hashes``; older models
    have none.
    """

    patterns: Mapping[str, NMPattern]
    shapes: Mapping[str, tuple[int, int]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "allocation": {name: str(pattern) for name, pattern in self.patterns.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            **({"shared": dict(self.shared)} if self.shared else {}),
            "recipe": _json_safe(self.recipe),
            "versions": dict(self.versions),
            **({"hashes": dict(self.hashes)} if self.hashes else {}),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Manifest:
        """Read what ``to_dict`` wrote.

        Raises:
            MspError: another format, or an entry that is wrong; the message names the entry.
        """
        if config.get("quant_method") != QUANT_METHOD:
            found = shown(config.get("quant_method"))
            raise MspError(f"quantization_config: quant_method is {found}, not {QUANT_METHOD!r}")
        if type(config.get("format")) is not int or config["format"] != FORMAT:
            found = shown(config.get("format"))
            raise MspError(f"quantization_config: format {found} is not {FORMAT}, the one this msp {__version__} reads")
        missing = next((key for key in ("allocation", "shapes") if config.get(key) is None), None)
        if missing is not None:
            raise MspError(f"quantization_config: {missing} is missing or not an object")
        read = {key: table(config.get(key) or {}, f"quantization_config: {key}") for key in TABLES}
        allocation, shapes, shared = read["allocation"], read["shapes"], read["shared"]
        if allocation.keys() != shapes.keys():
            names = ", ".join(sorted(allocation.keys() ^ shapes.keys())[:3])
            raise MspError(f"quantization_config: allocation and shapes do not name the same linears: {names}")
        patterns = {name: _parse_pattern(name, text) for name, text in allocation.items()}
        parsed = {name: _parse_shape(name, shape, patterns[name]) for name, shape in shapes.items()}
        for name, first in shared.items():
            if text(first, f"quantization_config: shared: {name}") not in patterns or name in patterns:
                raise MspError(
                    f"quantization_config: shared: {name} has the weight of {first!r}, which is not allocated"
                )
        versions = {
            name: text(version, f"quantization_config: versions: {name}") for name, version in read["versions"].items()
        }
        recipe = plain(read["recipe"], "quantization_config: recipe")
        hashes = read_hashes(read["hashes"], "quantization_config: hashes")
        return cls(patterns, parsed, recipe, versions, dict(shared), hashes)

    def renamed(self, names: Mapping[str, str]) -> Manifest:
        """The same manifest with every linear ``name`` called ``names[name]``."""
        return replace(
            self,
            patterns={names[name]: pattern for name, pattern in self.patterns.items()},
            shapes={names[name]: shape for name, shape in self.shapes.items()},
            shared={names[name]: names[first] for name, first in self.shared.items()},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every linear that has an allocated weight."""
        return (*self.patterns, *self.shared)

    @property
    def places(self) -> dict[str, list[str]]:
        """Of every weight that stands at several places, by the name of the first one, the names of the others."""
        places: dict[str, list[str]] = {}
        for name, first in self.shared.items():
            places.setdefault(first, []).append(name)
        return places

    def tensors(self, name: str) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """The shape and the possible dtypes (safetensors names) of each tensor of a packed linear."""
        (rows, columns), pattern = self.shapes[name], self.patterns[name]
        return {
            f"{name}.values": ((rows, columns // pattern.m * pattern.n), VALUE_DTYPES),
            f"{name}.bitmask": ((rows, math.ceil(columns / 8)), ("U8",)),
        }


def _parse_pattern(name: str, pattern: object) -> NMPattern:
    try:
        if not isinstance(pattern, str):
            raise MspError(f"{shown(pattern)} is not a pattern; N:M is one, like 2:8")
        return NMPattern.parse(pattern)
    except MspError as error:
        # A checkpoint with a wrong entry is not a wrong request, so a UsageError does not escape.
        raise MspError(f"quantization_config: allocation of {name}: {error}") from error


def _parse_shape(name: str, shape: object, pattern: NMPattern) -> tuple[int, int]:
    sizes = list(shape) if isinstance(shape, (list, tuple)) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in sizes):
        raise MspError(f"quantization_config: shapes of {name}: {shown(shape)} is not [out, in]")
    if sizes[1] % pattern.m:
        raise MspError(f"quantization_config: {name}: {sizes[1]} columns are not a multiple of the group of {pattern}")
    return sizes[0], sizes[1]


def _json_safe(value: Any) -> Any:
    """``value`` with infinities and NaN spelled out: JSON has none, and a strict reader would refuse the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    return value
