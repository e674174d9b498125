"""Packed checkpoints: their content and how it is written. ``msp.packed.info`` reads and checks it.

A packed checkpoint is a ``transformers`` model directory in safetensors. A linear of pattern N:M is stored
as ``<name>.values`` ``[R, K/M*N]`` and ``<name>.bitmask`` ``[R, ceil(K/8)]`` uint8, with an empty ``<name>.weight`` as
its guard. A linear whose pattern keeps everything is stored as its plain ``<name>.weight``; the table of
``msp.formats.storage`` has the parts of all storages. The ``quantization_config`` of ``config.json`` is the
``Manifest``: every linear's storage and shape, and the recipe.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

from msp import __version__
from msp.base.files import save_tensors
from msp.base.hashes import Hashing
from msp.base.outputs import check_room, new_folder
from msp.base.readable import dtype_name
from msp.base.reading import read_object
from msp.base.safetensors_files import header_bytes, read_headers, tensor_files
from msp.errors import MspError, first_line
from msp.formats.manifest import Manifest
from msp.models.as_loaded import StoredDtypes, most_common
from msp.models.structure import weight_identity
from msp.models.travelling import edit_config, keep_auto_map, tokenizer_travels, travel
from msp.ops import CodedWeight, PackedWeight
from msp.packed.auto_map import add_loader
from msp.packed.info import PackedInfo, read_info
from msp.packed.model_card import model_card
from msp.packed.sparse_linear import (
    at_places,
    by_weight,
    find_linear,
    guarded_state_dict,
    note_pattern,
    shape_of,
)


def manifest_of(model: nn.Module, recipe: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of a model whose linears are packed in place; ``MspError`` if no linear is packed."""
    weights = by_weight(model)
    if not weights:
        raise MspError(f"this {type(model).__name__} has no packed linears: prune it first")
    storages = {names[0]: storage for names, storage in weights}
    shapes = {name: shape_of(model.get_submodule(name)) for name in storages}
    versions = {"msp": __version__, "torch": str(torch.__version__), "transformers": transformers_version}
    shared = {other: names[0] for names, _ in weights for other in names[1:]}
    return Manifest(storages, shapes, recipe or {}, versions, shared)


def replace_linears(model: nn.Module, packed: Mapping[str, PackedWeight | CodedWeight]) -> None:
    """Replace each named linear of ``model`` by a ``SparseLinear`` with the linear's own bias.

    A weight that stands at several places is replaced at all of them, under any of its names.

    A pattern that keeps everything leaves its module as it is and only records the pattern on it. Afterwards the
    model's own ``save_pretrained`` writes a packed checkpoint.

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
        if weight.storage.is_dense:
            for _, module in same:
                note_pattern(module, weight.pattern)
        else:
            sparse = at_places(weight, [module for _, module in same])
            for (place, _), module in zip(same, sparse, strict=True):
                model.set_submodule(place, module)
    mark_packed(model)


def mark_packed(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model whose linears are packed write a packed checkpoint.

    Raises:
        MspError: it has no packed linears.
    """
    _attach_manifest(model, manifest_of(model))


def _attach_manifest(model: nn.Module, manifest: Manifest) -> None:
    from transformers import PreTrainedModel

    from msp.packed.hf_quantizer import attach

    if isinstance(model, PreTrainedModel):
        attach(model, manifest)


def save_packed(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    recipe: Mapping[str, Any],
    force: bool = False,
    max_shard_size: int | str = "5GB",
    origin: Path | None = None,
) -> Path:
    """Write a model whose linears are packed, its tokenizer (if not None) and a model card to ``out``.

    Args:
        origin: folder of the dense model. Its tokenizer, templates, processors, code and licence are copied as they
            are, see ``msp.models.travelling``.

    All or nothing: everything is written to a hidden directory next to ``out``, which replaces ``out`` in one step, see
    ``msp.base.outputs``. ``out`` is replaced only if msp wrote everything in it.

    Returns:
        The directory written, links resolved.

    Raises:
        MspError: see ``msp.base.outputs.check_output``; no packed linears; another run writes to ``out``; or the files
            cannot be written.
    """
    manifest = manifest_of(model, recipe)
    json.dumps(manifest.to_dict())
    with new_folder(out, force, model=origin or model) as (partial, target):
        _attach_manifest(model, manifest)
        # Tensors keep the names of their modules, as in the manifest, also if published files have other names.
        model.save_pretrained(partial, max_shard_size=max_shard_size, save_original_format=False)
        _describe(partial, tokenizer, origin)
    return target


def _describe(folder: Path, tokenizer: Any, origin: Path | None) -> None:
    """Write the files that go with the weights, and the model card."""
    if tokenizer is not None and (origin is None or not tokenizer_travels(origin)):
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # of tokenizers, whose error of a full disk is not even an OSError
            raise OSError(f"the tokenizer: {first_line(error)}") from error
    if origin is not None:
        travel(origin, folder, tokenizer)
        keep_auto_map(origin, folder)
    add_loader(folder)
    info = read_info(folder)
    record_hashes(folder)
    # transformers names the dtype of the first parameter, and loads all weights in the dtype named here.
    edit_config(folder, dtype=dtype_name(_common_dtype(folder, info)))
    (folder / "README.md").write_text(model_card(info), encoding="utf-8")


def record_hashes(folder: Path) -> None:
    """Write the hashes of all stored tensors into ``config.json``, or compare them with the hashes there.

    Raises:
        MspError: the file of a tensor differs from the tensor in memory.
    """
    headers, entries = read_headers(tensor_files(folder)), read_object(folder / "config.json", foreign=True)
    config = entries["quantization_config"]
    found = Hashing(headers)
    if config.get("hashes"):
        found.compare(config["hashes"])  # before the tensors went to disk
    edit_config(folder, quantization_config=config | {"hashes": found.result()})


def _common_dtype(folder: Path, info: PackedInfo) -> torch.dtype:
    """The dtype in which most weights of the dense model were stored."""
    headers = read_headers(tensor_files(folder))
    for linear in info.linears:
        label = next(iter(linear.storage.parts(*linear.shape)))
        name = f"{linear.name}.{label}"
        headers[name] = replace(headers[name], shape=linear.shape, dtype=linear.dtype)
    return most_common(headers)


class PackedShards:
    """A packed checkpoint that is written block by block, a file for each.

    Args:
        folder: an existing folder to write to.
        stored: the dtypes of the stored tensors.
        origin: as in ``save_packed``.
    """

    def __init__(self, folder: Path, stored: StoredDtypes, origin: Path | None = None) -> None:
        self._folder = folder
        self._stored = stored
        self._origin = origin
        self._blocks: list[Path] = []

    def write(self, module: nn.Module, prefix: str) -> None:
        """Store a block, whose linears are packed, under the names that begin with ``prefix``."""
        with as_stored(module, self._stored, prefix):
            state = guarded_state_dict(module)
            tensors = {f"{prefix}{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        file = self._folder / f"block-{len(self._blocks)}.safetensors"
        save_tensors(tensors, file, metadata={"format": "pt"})
        self._blocks.append(file)

    def finish(self, model: Any, tokenizer: Any, recipe: Mapping[str, Any]) -> None:
        """Store the rest of ``model``, which has a ``SparseLinear`` on no device for each packed linear."""
        _attach_manifest(model, manifest_of(model, recipe))
        model.hf_quantizer = None  # transformers would ask it for the weights of the whole model
        written = read_headers(self._blocks)
        with as_stored(model, self._stored):
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
        _describe(self._folder, tokenizer, self._origin)


@contextmanager
def packed_shards(
    out: str | Path, stored: StoredDtypes, size: int, *, force: bool = False, origin: Path | None = None
) -> Iterator[PackedShards]:
    """The shards of a checkpoint at ``out``, which appears at the end of the context, and not before.

    Raises:
        MspError: see ``save_packed``; or there is no room for ``size`` bytes.
    """
    with new_folder(out, force, model=origin) as (partial, _):
        check_room(out, size, "the packed model")
        yield PackedShards(partial, stored, origin)


@contextmanager
def as_stored(module: nn.Module, stored: StoredDtypes, prefix: str = "") -> Iterator[None]:
    """Floating tensors in their stored dtypes for the length of the context.

    Args:
        prefix: the beginning of the names of ``module`` in ``stored``. Buffers that no file holds are left alone.
    """
    saved = module.state_dict().keys()
    # not the tensors of the state dict: a packed linear may return a copy in another layout there
    tensors = [
        *module.named_parameters(),
        *((name, buffer) for name, buffer in module.named_buffers() if name in saved),
    ]
    before: list[tuple[Tensor, torch.dtype, Tensor | None]] = []
    try:
        for name, tensor in tensors:
            if tensor.is_floating_point():
                data, as_stored = tensor.data, tensor.data.to(stored.of(f"{prefix}{name}"))
                # what comes back from its stored form bit for bit need not be in memory twice
                exact = not data.is_meta and torch.equal(as_stored.to(data.dtype), data)
                before.append((tensor, data.dtype, None if exact else data))
                tensor.data = as_stored
                del data, as_stored
        yield
    finally:
        for tensor, dtype, kept in before:
            tensor.data = tensor.data.to(dtype) if kept is None else kept
