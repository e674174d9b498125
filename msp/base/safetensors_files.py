"""The safetensors files of a model directory: which they are, their headers, and one tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from msp.base.reading import file_inside, read_object, table, text
from msp.errors import MspError

INDEX = "model.safetensors.index.json"
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class TensorHeader:
    """The file of a tensor, its shape and its dtype as safetensors spells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # BOOL has none, and takes a byte
        return math.prod(self.shape) * int(bits[0] if bits else 8) // 8


def tensor_files(path: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model directory; ``MspError`` if it has none or one is missing."""
    path = Path(path)
    single, index = path / "model.safetensors", path / INDEX
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise MspError(f"{path} has no model.safetensors")
    weight_map = table(read_object(index, foreign=True).get("weight_map"), f"{index}: weight_map")
    if not weight_map:
        raise MspError(f"{index}: weight_map names no file")
    names = {text(name, f"{index}: weight_map") for name in weight_map.values()}
    return tuple(file_inside(path, name, str(index)) for name in sorted(names))


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """Shape and dtype of every tensor in the safetensors ``files``; reads no tensor.

    Raises:
        MspError: a file that is missing, truncated or no safetensors, or a tensor that two files hold.
    """
    headers: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise MspError(f"{file}: weights are read from safetensors only")
        try:
            with safe_open(file, framework="pt") as reader:
                for name in list(reader.keys()):
                    if name in headers:
                        raise MspError(f"{name}: stored twice, in {headers[name].file.name} and {file.name}")
                    piece = reader.get_slice(name)
                    headers[name] = TensorHeader(file, tuple(piece.get_shape()), piece.get_dtype())
        except (OSError, SafetensorError) as error:
            reason = lfs_pointer(file) or f"missing, truncated or not safetensors: {error}"
            raise MspError(f"{file}: {reason}") from error
    return headers


def split_guards(
    headers: Mapping[str, TensorHeader],
) -> tuple[dict[str, TensorHeader], dict[str, TensorHeader]]:
    """The tensors of a packed model, and its guards: the empty ``<linear>.weight`` of each packed linear.

    A loader that does not support the format would leave packed linears at random values. The guard makes it fail on a
    shape that does not fit. Checkpoints without guards are valid too.
    """
    guards = {name: header for name, header in headers.items() if name.endswith(".weight") and header.shape == (0,)}
    return {name: header for name, header in headers.items() if name not in guards}, guards


def lfs_pointer(file: Path) -> str:
    """The reason if ``file`` is the pointer that a clone without git-lfs leaves instead of a large file; else empty."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(LFS_HEADER)) == LFS_HEADER
    except OSError:
        return ""
    return "a pointer of git-lfs, not the file itself: run git lfs pull" if is_pointer else ""


def header_bytes(file: Path) -> int:
    """The bytes before the first tensor: the length of the header in 8 bytes, and the header."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def read_tensor(headers: Mapping[str, TensorHeader], name: str) -> Tensor:
    """One stored tensor, on the CPU."""
    with safe_open(headers[name].file, framework="pt") as reader:
        tensor = reader.get_tensor(name)
    assert isinstance(tensor, Tensor)
    return tensor
