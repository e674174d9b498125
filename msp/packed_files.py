"""What a packed checkpoint holds, as far as it can be told and checked without loading the model.

``msp.checkpoint`` says what lies where and writes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msp.errors import MspError
from msp.formats.storage import BITMASK, DENSE, FLOATS, Storage, part_names
from msp.hashes import Hashing, note_without
from msp.manifest import QUANT_METHOD, Manifest
from msp.ops import CodedWeight, PackedWeight
from msp.ops.layouts import has_tiles
from msp.ops.nm_linear_plan import kept_bytes, slower_from_tokens, stays_dense
from msp.ops.packed import from_parts
from msp.patterns import Allocation, NMPattern
from msp.reading import file_inside, read_object, table, text

INDEX = "model.safetensors.index.json"
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies, its shape and its dtype as safetensors spells it."""

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

    A loader that does not know the format would leave packed linears at random values; the guard makes it fail on a
    shape that does not fit. Checkpoints without guards are as valid.
    """
    guards = {name: header for name, header in headers.items() if name.endswith(".weight") and header.shape == (0,)}
    return {name: header for name, header in headers.items() if name not in guards}, guards


def lfs_pointer(file: Path) -> str:
    """Says that ``file`` is what a clone without git-lfs leaves in the place of a large file; empty if it is not."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(LFS_HEADER)) == LFS_HEADER
    except OSError:
        return ""
    return "a pointer of git-lfs, not the file itself: run git lfs pull" if is_pointer else ""


def check_headers(manifest: Manifest, headers: Mapping[str, TensorHeader]) -> None:
    """Check that exactly the tensors that ``manifest`` calls for are stored, in their shapes and dtypes.

    ``headers`` come without guards: see ``split_guards``.

    Raises:
        MspError: names the first tensor that is missing, wrong, or packed without being in the manifest.
    """
    expected: set[str] = set()
    for name, storage in manifest.storages.items():
        if storage.is_dense:
            rows, columns = manifest.shapes[name]
            found = headers.get(f"{name}.weight")
            if found is None:
                raise MspError(f"{name}.weight: missing from the checkpoint, and {storage} keeps it dense")
            if found.shape not in ((rows, columns), (columns, rows)):
                raise MspError(f"{name}.weight: shape {list(found.shape)}, needs [{rows}, {columns}]")
            continue
        tensors = manifest.tensors(name)
        expected |= tensors.keys()
        for tensor, (shape, dtypes) in tensors.items():
            found = headers.get(tensor)
            if found is None:
                raise MspError(f"{tensor}: missing from the checkpoint, and the allocation says {storage}")
            if found.shape != shape:
                raise MspError(f"{tensor}: shape {list(found.shape)}, needs {list(shape)} for {storage}")
            if found.dtype not in dtypes:
                raise MspError(f"{tensor}: dtype {found.dtype}, needs {' or '.join(dtypes)}")
        if weight := headers.get(f"{name}.weight"):
            raise MspError(
                f"{name}.weight: shape {list(weight.shape)} beside packed tensors, needs [0] or no such tensor"
            )
    kinds = part_names()
    for tensor in headers:
        name, _, kind = tensor.rpartition(".")
        if tensor in expected or kind not in kinds or f"{name}.{BITMASK}" not in headers:
            continue
        if any(f"{name}.{other}" in headers for other in kinds - {BITMASK}):
            raise MspError(f"{tensor}: packed in the checkpoint, but not in the allocation")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in ``config.json`` of a model directory; ``MspError`` if it holds no packed model."""
    config = Path(path) / "config.json"
    if not config.is_file():
        raise MspError(f"{path} is not a model: it has no config.json")
    manifest = read_object(config, foreign=True).get("quantization_config")
    if not isinstance(manifest, dict) or manifest.get("quant_method") != QUANT_METHOD:
        raise MspError(f"{path} is not a packed model: its config.json has no quantization_config of msp's")
    try:
        return Manifest.from_dict(manifest)
    except MspError as error:
        raise MspError(f"{config}: {error}") from error


@dataclass(frozen=True)
class LinearInfo:
    """One linear of a packed checkpoint; ``packed_bytes`` are on disk, ``dense_bytes`` at the same dtype."""

    name: str
    storage: Storage
    shape: tuple[int, int]
    dtype: str
    packed_bytes: int
    dense_bytes: int

    @property
    def pattern(self) -> NMPattern:
        assert self.storage.support is not None  # the manifest sees to it
        return self.storage.support

    @property
    def bits_per_weight(self) -> float:
        return self.storage.bits_per_weight(*self.shape, FLOATS[self.dtype])

    @property
    def _packs_floats(self) -> bool:
        return not self.storage.is_dense and not self.storage.is_coded

    @property
    def dense_on_gpu(self) -> bool:
        """Whether it is unpacked once when it comes to a CUDA device; see ``SparseLinear.settle``."""
        return self._packs_floats and stays_dense(self.pattern, FLOATS[self.dtype])

    @property
    def fast_prefill_bytes(self) -> int:
        """What ``msp.fast_prefill`` keeps of it on a CUDA device at most; 0 for what does not lie in tiles there."""
        in_tiles = FLOATS[self.dtype].itemsize == 2 and has_tiles(self.pattern, *self.shape, torch.bfloat16)
        tiled = in_tiles and not self.storage.is_coded and not self.dense_on_gpu
        return kept_bytes(self.pattern, *self.shape) if tiled else 0

    @property
    def slower_from_tokens(self) -> int:
        """From how many tokens on a CUDA device is over 5 % slower with it than with the dense weight, unless
        ``msp.fast_prefill`` was called: by arithmetic, not measured. 0 where ``fast_prefill`` keeps nothing of it."""
        return slower_from_tokens(self.pattern) if self.fast_prefill_bytes else 0


@dataclass(frozen=True)
class PackedInfo:
    """What a packed checkpoint holds, read from its headers.

    ``other_bytes`` are the tensors that are no allocated linear: embeddings, norms, biases, the head.
    """

    path: Path
    manifest: Manifest
    linears: tuple[LinearInfo, ...]
    other_bytes: int
    file_bytes: int

    @property
    def allocation(self) -> Allocation:
        return Allocation(self.manifest.patterns)

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.manifest.recipe

    @property
    def packed_bytes(self) -> int:
        return sum(linear.packed_bytes for linear in self.linears)

    @property
    def dense_bytes(self) -> int:
        return sum(linear.dense_bytes for linear in self.linears)

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.manifest.shapes.values())

    @property
    def kept(self) -> int:
        return self.allocation.kept(self.manifest.shapes)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **self.manifest.to_dict(),
            "linears": [
                {
                    "name": linear.name,
                    "pattern": str(linear.pattern),
                    "storage": str(linear.storage),
                    "bits_per_weight": linear.bits_per_weight,
                    "shape": list(linear.shape),
                    "dtype": linear.dtype,
                    "packed_bytes": linear.packed_bytes,
                    "dense_bytes": linear.dense_bytes,
                    "dense_on_gpu": linear.dense_on_gpu,
                    "fast_prefill_bytes": linear.fast_prefill_bytes,
                    "slower_from_tokens": linear.slower_from_tokens,
                }
                for linear in self.linears
            ],
            "weights": self.weights,
            "kept": self.kept,
            "packed_bytes": self.packed_bytes,
            "dense_bytes": self.dense_bytes,
            "other_bytes": self.other_bytes,
            "file_bytes": self.file_bytes,
        }


def read_info(path: str | Path) -> PackedInfo:
    """What the packed checkpoint at ``path`` holds; checks names, shapes and dtypes and loads no tensor.

    Raises:
        MspError: not a packed model, or a file of it is missing, truncated or does not fit the manifest.
    """
    manifest = read_manifest(path)
    files = tensor_files(path)
    headers, guards = split_guards(read_headers(files))
    check_headers(manifest, headers)
    linears = []
    for name in sorted(manifest.storages, key=_natural):
        storage, shape = manifest.storages[name], manifest.shapes[name]
        own = [f"{name}.{label}" for label, part in storage.parts(*shape).items() if part.dtype is None]
        # what has no part in the model's dtype is told by its guard
        found = headers[own[0]] if own else guards.get(f"{name}.weight")
        spelled = found.dtype if found else "F32"
        dtype = FLOATS.get(spelled)
        if dtype is None:
            raise MspError(f"{name}.weight: dtype {spelled}, needs {' or '.join(FLOATS)}")
        sizes = storage.nbytes(*shape, dtype), DENSE.nbytes(*shape, dtype)
        linears.append(LinearInfo(name, storage, shape, spelled, *sizes))
    tensor_bytes = sum(file.stat().st_size - header_bytes(file) for file in files)
    other_bytes = tensor_bytes - sum(linear.packed_bytes for linear in linears)
    return PackedInfo(Path(path), manifest, tuple(linears), other_bytes, sum(file.stat().st_size for file in files))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10; ``config.json`` has its keys sorted as text."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def header_bytes(file: Path) -> int:
    """A safetensors file is the header's length in 8 bytes, the header, then the tensors without a gap."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def validate_packed(path: str | Path) -> PackedInfo:
    """Check a whole packed checkpoint: what ``read_info`` checks, the hash of every tensor, that each one with a hash
    is there, the kept positions of every group, and that no value is NaN or infinite.

    Raises:
        MspError: names the tensor at fault.
    """
    info = read_info(path)
    headers = read_headers(tensor_files(path))
    if info.manifest.hashes:
        Hashing(headers).compare(info.manifest.hashes)
        guards = {f"{name}.weight" for name in info.manifest.patterns}
        if missing := info.manifest.hashes.keys() - headers.keys() - guards:
            raise MspError(f"{path}: {min(missing)} is missing: config.json has its hash, and no file holds it")
    else:
        note_without(str(path))
    from msp.finite import check_finite  # knows models, which know this module

    for name in headers:
        check_finite([(name, read_tensor(headers, name))])
    for linear in info.linears:
        if not linear.storage.is_dense:
            read_packed(headers, linear.name, linear.storage, linear.shape).check(linear.name)
    return info


def read_packed(
    headers: Mapping[str, TensorHeader], name: str, storage: Storage, shape: tuple[int, int]
) -> PackedWeight | CodedWeight:
    """The weight of a packed linear of ``shape``, on the CPU and not checked."""
    labels = storage.parts(*shape)
    return from_parts({label: read_tensor(headers, f"{name}.{label}") for label in labels}, storage, shape)


def read_tensor(headers: Mapping[str, TensorHeader], name: str) -> Tensor:
    """One stored tensor, on the CPU."""
    with safe_open(headers[name].file, framework="pt") as reader:
        tensor = reader.get_tensor(name)
    assert isinstance(tensor, Tensor)
    return tensor
