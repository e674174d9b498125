"""The content of a packed checkpoint, as far as it can be read and checked without loading the model.

``msp.packed.checkpoint`` defines the layout and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msp.base.finite import check_finite
from msp.base.hashes import Hashing, note_without
from msp.base.outputs import QUANT_METHOD
from msp.base.readable import size
from msp.base.reading import read_object
from msp.base.safetensors_files import TensorHeader, header_bytes, read_headers, read_tensor, split_guards, tensor_files
from msp.errors import MspError
from msp.formats.manifest import Manifest
from msp.formats.packed_weight import from_parts
from msp.formats.patterns import Allocation, NMPattern
from msp.formats.storage import BITMASK, DENSE, FLOATS, Storage, part_names
from msp.ops import CodedWeight, PackedWeight
from msp.ops.linear.plan import kept_bytes, slower_from_tokens, stays_dense
from msp.ops.linear.tile_order import has_tiles


def check_headers(manifest: Manifest, headers: Mapping[str, TensorHeader]) -> None:
    """Check that exactly the tensors of ``manifest`` are stored, in their shapes and dtypes.

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
        assert self.storage.support is not None  # the manifest checks this
        return self.storage.support

    @property
    def bits_per_weight(self) -> float:
        return self.storage.bits_per_weight(*self.shape, FLOATS[self.dtype])

    @property
    def _packs_floats(self) -> bool:
        return not self.storage.is_dense and not self.storage.is_coded

    @property
    def dense_on_gpu(self) -> bool:
        """Whether it is unpacked once when it moves to a CUDA device; see ``SparseLinear.settle``."""
        return self._packs_floats and stays_dense(self.pattern, FLOATS[self.dtype])

    @property
    def fast_prefill_bytes(self) -> int:
        """The most bytes that ``msp.fast_prefill`` keeps on a CUDA device for it; 0 if it does not lie in tiles."""
        in_tiles = FLOATS[self.dtype].itemsize == 2 and has_tiles(self.pattern, *self.shape, torch.bfloat16)
        tiled = in_tiles and not self.storage.is_coded and not self.dense_on_gpu
        return kept_bytes(self.pattern, *self.shape) if tiled else 0

    @property
    def slower_from_tokens(self) -> int:
        """The number of tokens from which a product on a CUDA device is over 5 % slower than with the dense weight,
        unless ``msp.fast_prefill`` was called: by arithmetic, not measured. 0 if ``fast_prefill`` keeps nothing for
        it."""
        return slower_from_tokens(self.pattern) if self.fast_prefill_bytes else 0


@dataclass(frozen=True, repr=False)
class PackedInfo:
    """The content of a packed checkpoint, read from its headers.

    ``other_bytes`` counts the tensors that are no allocated linear: embeddings, norms, biases, the head.
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

    def __repr__(self) -> str:
        return (
            f"PackedInfo({self.path}: {len(self.linears)} linears keep {self.kept / max(1, self.weights):.2%}, "
            f"{size(self.packed_bytes)} of {size(self.dense_bytes)}, other tensors {size(self.other_bytes)})"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as ``msp info --json`` prints it."""
        return {"packed": True, **self.to_dict()}

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
    """Read the content of the packed checkpoint at ``path``; checks names, shapes and dtypes and loads no tensor.

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
        # a linear without a part in the model's dtype has that dtype in its guard
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


def validate_packed(path: str | Path) -> PackedInfo:
    """Check a whole packed checkpoint: the checks of ``read_info``, the hash of every tensor, that each tensor with a
    hash is there, the kept positions of every group, and that no value is NaN or infinite.

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
