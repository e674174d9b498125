"""Every linear at every level it may have, packed and on disk: the candidates of pruners that update weights.

One safetensors file a linear holds ``<pattern>.values`` and ``<pattern>.bitmask`` of each pattern between empty and
dense, in the dtype that a packed model is stored in. A file is there as a whole or not at all, so a build that was
killed goes on with the linear it was at. Files are memory-mapped when read. ``manifest.json`` says what the weights
depend on. The metadata of a file are the hashes of its tensors, which are compared when they are read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msp.errors import MspError
from msp.files import write_tensors, write_text
from msp.formats.storage import Storage
from msp.hashes import hash_tensor
from msp.identity import Identity, differences, hashed_data
from msp.ops import PackedWeight
from msp.patterns import NMPattern
from msp.reading import read_json, table
from msp.staging import clean_folder

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
        storages = map(Storage, self.patterns[name])
        return sum(storage.nbytes(*self._shapes[name], self._dtypes[name]) for storage in storages)

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
                self._remove(_read_manifest(manifest))
            self.folder.mkdir(parents=True, exist_ok=True)
            clean_folder(self.folder)
            needed, free = sum(map(self._nbytes, self.missing())), shutil.disk_usage(self.folder).free
            if needed > free:
                raise MspError(f"{self.folder}: the level database needs {needed:,} bytes, and {free:,} are free")
            write_text(manifest, json.dumps(self._manifest))
        except OSError as error:
            raise MspError(f"{self.folder} cannot be written: {error}") from error
        return removed

    def _remove(self, manifest: Mapping[str, Any]) -> None:
        """Remove the files of another database, and no others: the folder is where the user said."""
        for file in self.folder.glob("*.safetensors"):
            if file.name.removesuffix(".safetensors") in manifest["levels"]:
                file.unlink()
        # the last to go: what a run that is killed leaves is known by it
        (self.folder / "manifest.json").unlink()

    def write(self, name: str, levels: Iterable[PackedWeight]) -> None:
        """Store linear ``name`` at every level, in the order of its patterns; ``MspError`` where it cannot be."""
        tensors: dict[str, Tensor] = {}
        for pattern, packed in zip(self.patterns[name], levels, strict=True):
            stored = packed.to("cpu", self._dtypes[name])
            tensors |= {f"{pattern}.{part}": tensor for part, tensor in stored.parts.items()}
        hashes = {name: hash_tensor(tensor) or "" for name, tensor in tensors.items()}
        write_tensors(tensors, self._file(name), metadata=hashes)

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
                hashes = reader.metadata() or {}
                for pattern in self.patterns[name]:
                    labels = Storage(pattern).parts(*self._shapes[name])
                    parts = {part: reader.get_tensor(f"{pattern}.{part}") for part in labels}
                    for part, tensor in parts.items():
                        if hashes.get(f"{pattern}.{part}") != hash_tensor(tensor):
                            raise MspError(f"{file}: damaged, to be removed: {pattern}.{part} has another hash")
                    levels[pattern] = PackedWeight(**parts, pattern=pattern, shape=self._shapes[name])
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
        return dict(table(read_json(file), "the file", ("levels",)))
    except MspError as error:
        raise MspError(f"{file} is in the way: it is not that of a level database: {error}") from error
