"""What the ``config.json`` of a packed model says about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from msp import __version__
from msp.base.hashes import NAMES, read_hashes
from msp.base.outputs import QUANT_METHOD
from msp.base.reading import plain, shown, table, text
from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.formats.storage import VALUE_DTYPES, Storage

FORMAT = 1
TABLES = ("allocation", "shapes", "shared", "recipe", "versions", "hashes")
LARGEST_SIZE = 1 << 31


@dataclass(frozen=True)
class Manifest:
    """What ``config.json`` says about a packed model: storages, ``[out, in]`` shapes, recipe, versions.

    A weight that stands at several places is stored once, under the name of the first one. ``shared`` names the others,
    and for each the first one. ``hashes`` are those of all stored tensors by name, see ``msp.base.hashes``; older
    models have none.
    """

    storages: Mapping[str, Storage]
    shapes: Mapping[str, tuple[int, int]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "allocation": {name: str(storage) for name, storage in self.storages.items()},
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
        storages = {name: _parse_storage(name, text) for name, text in allocation.items()}
        parsed = {name: _parse_shape(name, shape, storages[name]) for name, shape in shapes.items()}
        for name, first in shared.items():
            if text(first, f"quantization_config: shared: {name}") not in storages or name in storages:
                raise MspError(
                    f"quantization_config: shared: {name} has the weight of {first!r}, which is not allocated"
                )
        versions = {
            name: text(version, f"quantization_config: versions: {name}") for name, version in read["versions"].items()
        }
        recipe = plain(read["recipe"], "quantization_config: recipe")
        hashes = read_hashes(read["hashes"], "quantization_config: hashes")
        return cls(storages, parsed, recipe, versions, dict(shared), hashes)

    def renamed(self, names: Mapping[str, str]) -> Manifest:
        """The same manifest with every linear ``name`` called ``names[name]``."""
        return replace(
            self,
            storages={names[name]: storage for name, storage in self.storages.items()},
            shapes={names[name]: shape for name, shape in self.shapes.items()},
            shared={names[name]: names[first] for name, first in self.shared.items()},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every linear that has an allocated weight."""
        return (*self.storages, *self.shared)

    @property
    def patterns(self) -> dict[str, NMPattern]:
        """The N:M of every linear, however its values are written."""
        return {name: storage.support for name, storage in self.storages.items() if storage.support is not None}

    @property
    def places(self) -> dict[str, list[str]]:
        """Of every weight that stands at several places, by the name of the first one, the names of the others."""
        places: dict[str, list[str]] = {}
        for name, first in self.shared.items():
            places.setdefault(first, []).append(name)
        return places

    def tensors(self, name: str) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """The shape and the possible dtypes (safetensors names) of each tensor of a packed linear."""
        return {
            f"{name}.{label}": (part.shape, tuple(NAMES[d] for d in ([part.dtype] if part.dtype else VALUE_DTYPES)))
            for label, part in self.storages[name].parts(*self.shapes[name]).items()
        }


def _parse_storage(name: str, storage: object) -> Storage:
    try:
        if not isinstance(storage, str):
            raise MspError(f"{shown(storage)} is not a pattern; N:M is one, like 2:8")
        parsed = Storage.parse(storage)
        if parsed.support is None:
            raise MspError(f"{shown(storage)} has no pattern; N:M is one, like 2:8")
        if parsed.values is not None and not parsed.values.is_built:
            raise MspError(f"this msp {__version__} cannot read {parsed.values} values")
        return parsed
    except MspError as error:
        # A checkpoint with a wrong entry is not a wrong request, so a UsageError does not escape.
        raise MspError(f"quantization_config: allocation of {name}: {error}") from error


def _parse_shape(name: str, shape: object, storage: Storage) -> tuple[int, int]:
    sizes = list(shape) if isinstance(shape, (list, tuple)) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in sizes):
        raise MspError(f"quantization_config: shapes of {name}: {shown(shape)} is not [out, in]")
    try:
        storage.check(sizes[1])
    except MspError as error:
        raise MspError(f"quantization_config: {name}: {error}") from error
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
