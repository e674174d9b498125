"""Every linear at every level it may have, packed and on disk: the candidates of pruners that update weights.

One safetensors file a linear holds ``<pattern>.values`` and ``<pattern>.bitmask`` of each pattern between empty and
dense, in the dtype that a packed model is stored in. A file is there as a whole or not at all, so a build that was
killed goes on with the linear it was at. Files are memory-mapped when read. ``manifest.json`` says what the weights
depend on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msp.errors import MspError
from msp.files import save_tensors
from msp.identity import Identity, differences, hashed_data
from msp.ops import PackedWeight
from msp.patterns import NMPattern

FORMAT = 1

# Its folder, beside the checkpoint of a search.
DATABASE = "database"


class PackedLevels(dict[NMPattern, PackedWeight]):
    """One linear at each of its patterns between empty and dense."""


class LevelDatabase:
    """The files of one folder, which is its own; they are neither read nor written before ``open``.

    Args:
        folder: need not be there.
        shapes: ``[out, in]`` of every linear.
        patterns: those that every linear may have; what is empty or dense needs no weight.
        dtypes: of the values of every linear as stored.
        origin: what the weights depend on beside these.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, int]],
        patterns: Mapping[str, Sequence[NMPattern]],
        dtypes: Mapping[str, torch.dtype],
        origin: Identity,
    ) -> None:
        self.folder = folder
        self.patterns = {
            name: [pattern for pattern in patterns[name] if not (pattern.is_empty or pattern.is_dense)]
            for name in shapes
        }
        self._shapes = shapes
        self._dtypes = dtypes
        levels = {name: list(map(str, own)) for name, own in self.patterns.items()}
        self._manifest = {"format": FORMAT, **origin, "dtypes": {name: str(dtype) for name, dtype in dtypes.items()}}
        self._manifest |= {"levels": levels}

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights, whether they are there or not; files have their headers beside them."""
        return sum(map(self._nbytes, self._shapes))

    def _nbytes(self, name: str) -> int:
        rows, columns = self._shapes[name]
        kept = sum(pattern.kept(rows, columns) for pattern in self.patterns[name])
        return kept * self._dtypes[name].itemsize + len(self.patterns[name]) * rows * math.ceil(columns / 8)

    def missing(self) -> list[str]:
        """The linears that are still to be written."""
        return [name for name in self._shapes if not self._file(name).exists()]

    def check(self) -> bool:
        """Whether there is a database in the folder.

        Raises:
            MspError: what is in the folder is no database, or that of another run; the message names what differs.
        """
        if differs := self._differences():
            raise MspError(f"{self.folder} is the level database of another run: {differs}; start anew without resume")
        return (self.folder / "manifest.json").exists()

    def _differences(self) -> str:
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            return ""
        found = _read_manifest(manifest)
        return "; ".join(differences(_comparable(self._manifest), _comparable(found)))

    def open(self, *, resume: bool = False) -> str:
        """Prepare the folder; a database of the same origin is gone on with, one of another is removed.

        Args:
            resume: refuse to remove it.

        Returns:
            What was removed and why, or nothing.

        Raises:
            MspError: what is in the folder is no database or is not to be removed, or the disk has too little space.
        """
        manifest, removed = self.folder / "manifest.json", ""
        try:
            if resume:
                self.check()
            elif differs := self._differences():
                removed = f"{self.folder} was the level database of another run ({differs}): built anew"
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            needed, free = sum(map(self._nbytes, self.missing())), shutil.disk_usage(self.folder).free
            if needed > free:
                raise MspError(f"{self.folder}: the level database needs {needed:,} bytes, and {free:,} are free")
            temporary = manifest.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._manifest), encoding="utf-8")
            os.replace(temporary, manifest)
        except OSError as error:
            raise MspError(f"{self.folder} cannot be written: {error}") from error
        return removed

    def write(self, name: str, levels: Iterable[PackedWeight]) -> None:
        """Store linear ``name`` at every level, in the order of its patterns."""
        tensors: dict[str, Tensor] = {}
        for pattern, packed in zip(self.patterns[name], levels, strict=True):
            stored = packed.to("cpu", self._dtypes[name])
            tensors |= {f"{pattern}.values": stored.values, f"{pattern}.bitmask": stored.bitmask}
        file = self._file(name)
        temporary = file.with_suffix(".tmp")
        try:
            save_tensors(tensors, temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            raise MspError(f"{file} cannot be written: {error}") from error

    def read(self) -> dict[str, PackedLevels]:
        """Every linear at every level: checked, and mapped from the files.

        Raises:
            MspError: a file that is missing or is not what was written; the message names it.
        """
        return {name: self._read(name) for name in self._shapes}

    def _read(self, name: str) -> PackedLevels:
        file, levels = self._file(name), PackedLevels()
        try:
            with safe_open(file, framework="pt") as reader:
                for pattern in self.patterns[name]:
                    values, bitmask = (reader.get_tensor(f"{pattern}.{part}") for part in ("values", "bitmask"))
                    levels[pattern] = PackedWeight(values, bitmask, pattern, self._shapes[name])
        except (OSError, SafetensorError) as error:
            raise MspError(f"{file}: missing or damaged, to be removed: {error}") from error
        for pattern, packed in levels.items():
            packed.check(f"{file}: {pattern}")
            if packed.dtype != self._dtypes[name]:
                raise MspError(f"{file}: {pattern}.values are {packed.dtype}, but must be {self._dtypes[name]}")
        return levels

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _comparable(manifest: Mapping[str, Any]) -> Identity:
    return {name: value if isinstance(value, str) else hashed_data(value) for name, value in manifest.items()}


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        content["levels"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise MspError(f"{file} is in the way: it is not that of a level database: {error!r}") from error
    return content
