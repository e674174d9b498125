"""The rank codes of linears: the order in which the weights of every group are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msp.base.files import unwritable

Ranks = Mapping[int, Tensor]
"""The rank codes of one linear, for every M it may have: uint8 ``[R, K]`` from ``ops.nm_rank``."""


class StoredRanks(MutableMapping[str, Ranks]):
    """Rank codes in a folder, with one file per linear, which is memory-mapped when it is read.

    Raises:
        MspError: the file of a linear cannot be written; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()

    def __setitem__(self, name: str, ranks: Ranks) -> None:
        file = self._file(name)
        try:
            save_file({str(size): codes.cpu() for size, codes in ranks.items()}, file)
        except (OSError, SafetensorError) as error:
            raise unwritable(file, error) from error
        self._names.add(name)

    def __getitem__(self, name: str) -> Ranks:
        if name not in self._names:
            raise KeyError(name)
        return {int(size): codes for size, codes in load_file(self._file(name)).items()}

    def __delitem__(self, name: str) -> None:
        self._names.remove(name)
        self._file(name).unlink()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
