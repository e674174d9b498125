"""Packed checkpoints: what is written, how it is checked, and what can be read without loading it.

A packed checkpoint is a ``transformers`` model directory in safetensors. A linear of pattern N:M is stored
as ``<name>.values`` ``[R, K/M*N]`` and ``<name>.bitmask`` ``[R, ceil(K/8)]`` uint8, and one whose pattern
keeps everything as its plain ``<name>.weight``. The ``quantization_config`` of ``config.json`` is the
``Manifest``: every linear's pattern and shape, and the recipe.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import __version__ as transformers_version

from msp import __version__
from msp.errors import MspError
from msp.manifest import QUANT_METHOD, WEIGHT_BYTES, Manifest
from msp.model_card import model_card
from msp.ops import PackedWeight
from msp.ops.layouts import has_tiles
from msp.ops.nm_linear_plan import kept_bytes, slower_from_tokens, stays_dense
from msp.patterns import Allocation, NMPattern
from msp.sparse_linear import SparseLinear, find_linear, note_pattern, patterns_of, shape_of

__all__ = [
    "LinearInfo",
    "PackedInfo",
    "check_headers",
    "check_output",
    "in_dtype",
    "manifest_of",
    "packed_shards",
    "read_headers",
    "read_info",
    "replace_linears",
    "save_packed",
    "validate_packed",
]


def manifest_of(model: nn.Module, recipe: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of a model whose linears are packed in place; ``MspError`` if none is."""
    patterns = patterns_of(model)
    if not patterns:
        raise MspError(f"this {type(model).__name__} has no packed linears: prune it first")
    shapes = {name: shape_of(model.get_submodule(name)) for name in patterns}
    versions = {"msp": __version__, "torch": str(torch.__version__), "transformers": transformers_version}
    return Manifest(patterns, shapes, recipe or {}, versions)


def replace_linears(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Put a ``SparseLinear`` in the place of each named linear of ``model``, with the linear's own bias.

    A pattern that keeps everything leaves its module as it is and only notes the pattern on it. The
    model's own ``save_pretrained`` writes a packed checkpoint from then on.

    Raises:
        MspError: a name without a linear, or a packed weight of another shape; nothing is replaced then.
    """
    modules = {name: find_linear(model, name, weight.shape) for name, weight in packed.items()}
    for name, weight in packed.items():
        if weight.pattern.is_dense:
            note_pattern(modules[name], weight.pattern)
        else:
            model.set_submodule(name, SparseLinear.from_packed(weight, modules[name].bias))
    _attach_manifest(model, manifest_of(model))


def _attach_manifest(model: nn.Module, manifest: Manifest) -> None:
    from transformers import PreTrainedModel

    from msp.integrations.transformers import attach

    if isinstance(model, PreTrainedModel):
        attach(model, manifest)


def check_output(out: str | Path, force: bool = False) -> Path:
    """Where ``save_packed`` will write, links resolved; to be asked before any long work.

    Raises:
        MspError: ``out`` exists and ``force`` is off, or it is not a model that could be replaced, or
            nothing can be created beside it.
    """
    target = Path(os.path.realpath(out))
    if target.exists():
        if not force:
            raise MspError(f"{out} exists already; ask for it to be replaced with force")
        if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
            raise MspError(f"{out} exists and is not a model, so it is not replaced; choose another place")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    try:
        # Permission bits do not tell: a read-only mount, a full disk or an ACL may still refuse.
        os.rmdir(tempfile.mkdtemp(prefix=".msp-", dir=parent))
    except OSError as error:
        raise MspError(f"{out} cannot be written: {parent}: {error.strerror or error}") from error
    return target


def save_packed(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    recipe: Mapping[str, Any],
    force: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model whose linears are packed, its tokenizer (if not None) and a model card to ``out``.

    All or nothing: everything is written to a hidden directory beside ``out`` and renamed into place,
    and a model that is replaced goes only after its successor stands.

    Returns:
        The directory written, links resolved.

    Raises:
        MspError: see ``check_output``; no packed linears; or the files cannot be written.
    """
    manifest = manifest_of(model, recipe)
    json.dumps(manifest.to_dict())
    with new_folder(out, force) as (partial, target):
        _attach_manifest(model, manifest)
        # Tensors keep the names of their modules, as the manifest does, also where published files differ.
        model.save_pretrained(partial, max_shard_size=max_shard_size, save_original_format=False)
        _describe(partial, tokenizer, target.name)
    return target


def _describe(folder: Path, tokenizer: Any, name: str) -> None:
    """Put the tokenizer and the model card beside the weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(read_info(folder), name), encoding="utf-8")


class PackedShards:
    """A packed checkpoint that is written a block at a time, a file each.

    Args:
        folder: to write to, which is there.
        name: of the model.
        dtype: of weights as stored.
    """

    def __init__(self, folder: Path, name: str, dtype: torch.dtype) -> None:
        self._folder = folder
        self._name = name
        self._dtype = dtype
        self._blocks: list[Path] = []

    def write(self, module: nn.Module, prefix: str) -> None:
        """Store a block, whose linears are packed, under the names that begin with ``prefix``."""
        with in_dtype(module, self._dtype):
            tensors = {f"{prefix}{name}": tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
        file = self._folder / f"block-{len(self._blocks)}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        self._blocks.append(file)

    def finish(self, model: Any, tokenizer: Any, recipe: Mapping[str, Any]) -> None:
        """Store all else of ``model``, which has a ``SparseLinear`` on no device for each packed linear."""
        _attach_manifest(model, manifest_of(model, recipe))
        model.hf_quantizer = None  # transformers would ask it for the weights of the whole model
        written = read_headers(self._blocks)
        with in_dtype(model, self._dtype):
            rest = {name: tensor for name, tensor in model.state_dict().items() if name not in written}
            model.save_pretrained(self._folder, state_dict=rest, max_shard_size="1TB", save_original_format=False)
        files = [*self._blocks, self._folder / "model.safetensors"]
        shards = {file: f"model-{number:05}-of-{len(files):05}.safetensors" for number, file in enumerate(files, 1)}
        index = {
            "metadata": {"total_size": sum(file.stat().st_size - _header_bytes(file) for file in files)},
            "weight_map": {name: shards[header.file] for name, header in read_headers(files).items()},
        }
        for file, shard in shards.items():
            file.rename(self._folder / shard)
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        _describe(self._folder, tokenizer, self._name)


@contextmanager
def packed_shards(out: str | Path, dtype: torch.dtype, size: int, *, force: bool = False) -> Iterator[PackedShards]:
    """Shards of a checkpoint at ``out``, which is there when the context ends, and not before.

    Raises:
        MspError: see ``save_packed``; or there is no room for ``size`` bytes.
    """
    with new_folder(out, force) as (partial, target):
        free = shutil.disk_usage(partial).free
        if size > free:
            raise MspError(f"{out}: the packed model takes {size:,} bytes, and {free:,} are free there")
        yield PackedShards(partial, target.name, dtype)


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters in ``dtype`` for the length of the context; buffers (position tables) are left alone."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    try:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data = parameter.data.to(before[name])


@contextmanager
def new_folder(out: str | Path, force: bool = False) -> Iterator[tuple[Path, Path]]:
    """A hidden directory beside ``out``, and ``out`` itself, links resolved, into whose place it is renamed in the end.

    Raises:
        MspError: see ``check_output``; or what is done in the context cannot be written. ``out`` is as before then.
    """
    target = check_output(out, force)
    partial = _sibling(target, "partial")
    try:
        partial.mkdir(parents=True)
        yield partial, target
        _put_in_place(partial, target)
    except (OSError, SafetensorError) as error:
        raise MspError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}.{suffix}"


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; what stood there is removed after that, or put back on any failure."""
    retired = _sibling(target, "replaced")
    try:
        if target.exists():
            target.rename(retired)
        partial.rename(target)
    finally:
        if retired.exists() and not target.exists():
            retired.rename(target)
        shutil.rmtree(retired, ignore_errors=True)


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies, its shape and its dtype as safetensors spells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def tensor_files(path: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model directory; ``MspError`` if it has none or one is missing."""
    path = Path(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise MspError(f"{path} has no model.safetensors")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise MspError(f"{index}: no weight_map")
    return tuple(path / name for name in sorted(set(weight_map.values())))


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """Shape and dtype of every tensor in the safetensors ``files``; reads no tensor.

    Raises:
        MspError: a file that is missing, truncated or no safetensors, or a tensor that two files hold.
    """
    headers: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise MspError(f"{file}: a packed model is stored as safetensors only")
        try:
            with safe_open(file, framework="pt") as reader:
                for name in list(reader.keys()):
                    if name in headers:
                        raise MspError(f"{name}: stored twice, in {headers[name].file.name} and {file.name}")
                    piece = reader.get_slice(name)
                    headers[name] = TensorHeader(file, tuple(piece.get_shape()), piece.get_dtype())
        except (OSError, SafetensorError) as error:
            raise MspError(f"{file}: missing, truncated or not safetensors: {error}") from error
    return headers


def check_headers(manifest: Manifest, headers: Mapping[str, TensorHeader]) -> None:
    """Check that exactly the tensors that ``manifest`` calls for are stored, in their shapes and dtypes.

    Raises:
        MspError: names the first tensor that is missing, wrong, or packed without being in the manifest.
    """
    for name, pattern in manifest.patterns.items():
        if pattern.is_dense:
            rows, columns = manifest.shapes[name]
            found = headers.get(f"{name}.weight")
            if found is None:
                raise MspError(f"{name}.weight: missing from the checkpoint, and {pattern} keeps it dense")
            if found.shape not in ((rows, columns), (columns, rows)):
                raise MspError(f"{name}.weight: shape {list(found.shape)}, needs [{rows}, {columns}]")
            continue
        for tensor, (shape, dtypes) in manifest.tensors(name).items():
            found = headers.get(tensor)
            if found is None:
                raise MspError(f"{tensor}: missing from the checkpoint, and the allocation says {pattern}")
            if found.shape != shape:
                raise MspError(f"{tensor}: shape {list(found.shape)}, needs {list(shape)} for {pattern}")
            if found.dtype not in dtypes:
                raise MspError(f"{tensor}: dtype {found.dtype}, needs {' or '.join(dtypes)}")
    for tensor in headers:
        name, _, kind = tensor.rpartition(".")
        packed = kind in ("values", "bitmask") and {f"{name}.values", f"{name}.bitmask"} <= headers.keys()
        if packed and (name not in manifest.patterns or manifest.patterns[name].is_dense):
            raise MspError(f"{tensor}: packed in the checkpoint, but not in the allocation")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in ``config.json`` of a model directory; ``MspError`` if it holds no packed model."""
    config = Path(path) / "config.json"
    if not config.is_file():
        raise MspError(f"{path} is not a model: it has no config.json")
    manifest = _read_json(config).get("quantization_config")
    if not isinstance(manifest, dict) or manifest.get("quant_method") != QUANT_METHOD:
        raise MspError(f"{path} is not a packed model: its config.json has no quantization_config of msp's")
    try:
        return Manifest.from_dict(manifest)
    except MspError as error:
        raise MspError(f"{config}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MspError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise MspError(f"{path}: not a JSON object")
    return content


@dataclass(frozen=True)
class LinearInfo:
    """One linear of a packed checkpoint; ``packed_bytes`` are on disk, ``dense_bytes`` at the same dtype."""

    name: str
    pattern: NMPattern
    shape: tuple[int, int]
    dtype: str
    packed_bytes: int
    dense_bytes: int

    @property
    def dense_on_gpu(self) -> bool:
        """Whether it is unpacked once when it comes to a CUDA device; see ``SparseLinear.settle``."""
        return not self.pattern.is_dense and stays_dense(self.pattern, max(self._itemsize, 1))

    @property
    def fast_prefill_bytes(self) -> int:
        """What ``msp.fast_prefill`` keeps of it on a CUDA device at most; 0 for what does not lie in tiles there."""
        in_tiles = self._itemsize == 2 and has_tiles(self.pattern, *self.shape, torch.bfloat16)
        return kept_bytes(self.pattern, *self.shape) if in_tiles and not self.dense_on_gpu else 0

    @property
    def slower_from_tokens(self) -> int:
        """From how many tokens on a CUDA device is over 5 % slower with it than with the dense weight, unless
        ``msp.fast_prefill`` was called: by arithmetic, not measured. 0 where ``fast_prefill`` keeps nothing of it."""
        return slower_from_tokens(self.pattern) if self.fast_prefill_bytes else 0

    @property
    def _itemsize(self) -> int:
        return self.dense_bytes // max(self.shape[0] * self.shape[1], 1)


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
    headers = read_headers(files)
    check_headers(manifest, headers)
    linears = []
    for name in sorted(manifest.patterns, key=_natural):
        pattern = manifest.patterns[name]
        (rows, columns), dense = manifest.shapes[name], pattern.is_dense
        dtype = headers[f"{name}.{'weight' if dense else 'values'}"].dtype
        width = WEIGHT_BYTES.get(dtype)
        if width is None:
            raise MspError(f"{name}.weight: dtype {dtype}, needs {' or '.join(WEIGHT_BYTES)}")
        packed_bytes = pattern.kept(rows, columns) * width + (0 if dense else rows * math.ceil(columns / 8))
        linears.append(LinearInfo(name, pattern, (rows, columns), dtype, packed_bytes, rows * columns * width))
    tensor_bytes = sum(file.stat().st_size - _header_bytes(file) for file in files)
    other_bytes = tensor_bytes - sum(linear.packed_bytes for linear in linears)
    return PackedInfo(Path(path), manifest, tuple(linears), other_bytes, sum(file.stat().st_size for file in files))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10; ``config.json`` has its keys sorted as text."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _header_bytes(file: Path) -> int:
    """A safetensors file is the header's length in 8 bytes, the header, then the tensors without a gap."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def validate_packed(path: str | Path) -> PackedInfo:
    """Check a whole packed checkpoint: what ``read_info`` checks, and the kept positions of every group.

    Raises:
        MspError: names the tensor at fault.
    """
    info = read_info(path)
    headers = read_headers(tensor_files(path))
    for linear in info.linears:
        if not linear.pattern.is_dense:
            values, bitmask = (read_tensor(headers, f"{linear.name}.{kind}") for kind in ("values", "bitmask"))
            PackedWeight(values, bitmask, linear.pattern, linear.shape).check(linear.name)
    return info


def read_tensor(headers: Mapping[str, TensorHeader], name: str) -> Tensor:
    """One stored tensor, on the CPU."""
    with safe_open(headers[name].file, framework="pt") as reader:
        tensor = reader.get_tensor(name)
    assert isinstance(tensor, Tensor)
    return tensor
