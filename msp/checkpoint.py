"""Packed checkpoints: what is written, and how. ``msp.packed_files`` reads and checks it.

A packed checkpoint is a ``transformers`` model directory in safetensors. A linear of pattern N:M is stored
as ``<name>.values`` ``[R, K/M*N]`` and ``<name>.bitmask`` ``[R, ceil(K/8)]`` uint8 beside an empty
``<name>.weight``, its guard, and one whose pattern keeps everything as its plain ``<name>.weight``. The
``quantization_config`` of ``config.json`` is the ``Manifest``: every linear's pattern and shape, and the recipe.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

from msp import __version__
from msp.errors import MspError
from msp.integrations.auto_map import add_loader
from msp.manifest import Manifest
from msp.model import weight_identity
from msp.model_card import model_card
from msp.ops import PackedWeight
from msp.packed_files import header_bytes, read_headers, read_info
from msp.sparse_linear import (
    at_places,
    find_linear,
    guarded_state_dict,
    note_pattern,
    patterns_of,
    shape_of,
    shared_by,
)


def manifest_of(model: nn.Module, recipe: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of a model whose linears are packed in place; ``MspError`` if none is."""
    patterns = patterns_of(model)
    if not patterns:
        raise MspError(f"this {type(model).__name__} has no packed linears: prune it first")
    shapes = {name: shape_of(model.get_submodule(name)) for name in patterns}
    versions = {"msp": __version__, "torch": str(torch.__version__), "transformers": transformers_version}
    return Manifest(patterns, shapes, recipe or {}, versions, shared_by(model))


def replace_linears(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Put a ``SparseLinear`` in the place of each named linear of ``model``, with the linear's own bias.

    A weight that stands at several places is replaced at all of them, whichever of their names is given.

    A pattern that keeps everything leaves its module as it is and only notes the pattern on it. The
    model's own ``save_pretrained`` writes a packed checkpoint from then on.

    Raises:
        MspError: a name without a linear, or a packed weight of another shape; nothing is replaced then.
    """
    modules = {name: find_linear(model, name, weight.shape) for name, weight in packed.items()}
    places: dict[Hashable, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, Conv1D)):
            places[weight_identity(module.weight)].append((name, module))
    for name, weight in packed.items():
        same = places[weight_identity(modules[name].weight)]
        if weight.pattern.is_dense:
            for _, module in same:
                note_pattern(module, weight.pattern)
        else:
            sparse = at_places(weight, [module for _, module in same])
            for (place, _), module in zip(same, sparse, strict=True):
                model.set_submodule(place, module)
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
    """Put the tokenizer, the model card and the file that imports msp beside the weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    add_loader(folder)
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
            tensors = {
                f"{prefix}{name}": tensor.cpu().contiguous() for name, tensor in guarded_state_dict(module).items()
            }
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
            "metadata": {"total_size": sum(file.stat().st_size - header_bytes(file) for file in files)},
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
