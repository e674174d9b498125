"""Every linear at every level, packed and on disk: the source of candidates for pruners that update weights.

Each linear has one safetensors file. It holds ``<pattern>.values`` and ``<pattern>.bitmask`` of each pattern between
empty and dense, in the dtype that a packed model is stored in. A file is written as a whole or not at all, so a build
that was killed continues with the unfinished linear. Files are memory-mapped when they are read. ``manifest.json``
lists the inputs that the weights depend on. The metadata of a file holds the hashes of its tensors, which are compared
when the tensors are read.
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

from msp.base.files import write_tensors, write_text
from msp.base.hashes import hash_tensor
from msp.base.identity import Identity, differences, hashed_data
from msp.base.reading import read_json, table
from msp.base.staging import clean_folder
from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.formats.storage import Storage
from msp.ops import PackedWeight

FORMAT = 1

# The name of the folder of the database, which lies in the folder of the search's checkpoint.
DATABASE = "database"


class PackedLevels(dict[NMPattern, PackedWeight]):
    """One linear at each of its patterns between empty and dense."""


class LevelDatabase:
    """The level database in one folder, which holds nothing else; no file is read or written before ``open``.

    Args:
        folder: the folder of the database; it may be absent.
        shapes: the shape ``[out, in]`` of every linear.
        patterns: the patterns that every linear may have; the empty and the dense one are not stored.
        dtypes: the dtype of the stored values of every linear.
        origin: the other inputs that the weights depend on.
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
        """Bytes of all weights of the database, written or not, without the headers of the files."""
        return sum(map(self._nbytes, self._shapes))

    def _nbytes(self, name: str) -> int:
        storages = map(Storage, self.patterns[name])
        return sum(storage.nbytes(*self._shapes[name], self._dtypes[name]) for storage in storages)

    def missing(self) -> list[str]:
        """The names of the linears without a file."""
        return [name for name in self._shapes if not self._file(name).exists()]

    def check(self) -> bool:
        """Whether there is a database in the folder.

        Raises:
            MspError: the folder holds no database, or the database of another run; the message names the differences.
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
        """Prepare the folder; a database of the same origin is continued, a database of another origin is removed.

        Args:
            resume: raise an error instead of removing a database.

        Returns:
            A message that names the removed database and the reason, or an empty text.

        Raises:
            MspError: the folder holds no database, or one that must not be removed, or the disk has too little space.
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
        """Remove the files of another database, and no other file, because the user chose the folder."""
        for file in self.folder.glob("*.safetensors"):
            if file.name.removesuffix(".safetensors") in manifest["levels"]:
                file.unlink()
        # removed last, because a later run identifies the rest of a killed run by the manifest
        (self.folder / "manifest.json").unlink()

    def write(self, name: str, levels: Iterable[PackedWeight]) -> None:
        """Store linear ``name`` at every level, in the order of its patterns; ``MspError`` if the write fails."""
        tensors: dict[str, Tensor] = {}
        for pattern, packed in zip(self.patterns[name], levels, strict=True):
            stored = packed.to("cpu", self._dtypes[name])
            tensors |= {f"{pattern}.{part}": tensor for part, tensor in stored.parts.items()}
        hashes = {name: hash_tensor(tensor) or "" for name, tensor in tensors.items()}
        write_tensors(tensors, self._file(name), metadata=hashes)

    def read(self) -> dict[str, PackedLevels]:
        """Every linear at every level; the weights are checked, and mapped from the files.

        Raises:
            MspError: a file is missing or differs from the written one; the message names it.
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
