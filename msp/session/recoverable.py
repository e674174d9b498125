"""Checks that a packed model can be trained, and that a dense model can teach it; loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from msp.base.outputs import QUANT_METHOD
from msp.base.progress import Progress
from msp.base.readable import dtype_name
from msp.errors import MspError, UsageError
from msp.formats.manifest import Manifest
from msp.formats.storage import Storage
from msp.models.as_loaded import StoredDtypes
from msp.models.loading import (
    LoadedModel,
    load_model,
    local_folder,
    make_skeleton,
    read_causal_config,
    read_tokenizer,
)
from msp.models.quantised import check_dense, method_of
from msp.models.structure import Structure, find_structure
from msp.packed.checkpoint import manifest_of
from msp.packed.info import read_manifest
from msp.packed.sparse_linear import SparseLinear
from msp.session.opened import vocabulary_size
from msp.session.recover_options import RecoverOptions


@dataclass(frozen=True)
class Pair:
    """A packed model and its teacher before their weights are read.

    Attributes:
        model, teacher: as they were given: a directory, a hub id, or a model object.
        skeleton: the packed model without weights, or the model object.
        tokenizer: the tokenizer of the packed model, or None.
        recipe: the recipe of the packed model.
    """

    model: Any
    teacher: Any
    skeleton: Any
    tokenizer: Any
    recipe: Mapping[str, Any]

    def load(self, options: RecoverOptions, progress: Progress) -> tuple[LoadedModel, Any, Structure]:
        """The packed model in fp32 in host memory, the dense model on the device, and the blocks of the dense model.

        Raises:
            MspError: weights cannot be read, or a forward of the dense model fails or changes its weights.
        """
        trust = options.trust_remote_code
        with progress.stage("Loading the packed model"):
            if _is_object(self.model):
                recorded = StoredDtypes.of_model(self.model)
                student = LoadedModel(self.model.eval(), self.tokenizer, name_of(self.model), recorded)
            else:
                student = load_model(self.model, dtype="float32", trust_remote_code=trust)
        with progress.stage("Loading the dense model"):
            if _is_object(self.teacher):
                dense = self.teacher.to(options.device)
            else:
                dense = load_model(
                    self.teacher,
                    dtype="float32",
                    device=options.device,
                    dequantise=options.dequantise,
                    narrow=True,
                    trust_remote_code=trust,
                ).model
            structure = find_structure(dense)
        if structure.failure is not None:
            raise MspError(f"{name_of(self.teacher)}: a forward of token ids fails: {structure.failure}")
        if structure.changes.before:
            changed = min(structure.changes.before)
            raise MspError(
                f"{name_of(self.teacher)}: a forward changes {changed}: recovery of such a model is not built"
            )
        return student, dense, structure


def pair(model: Any, teacher: Any, tokenizer: Any, options: RecoverOptions) -> Pair:
    """Check ``model`` and ``teacher`` by their files, or as objects; reads no weights.

    Args:
        tokenizer: the tokenizer of a model object.

    Raises:
        UsageError: the teacher is packed.
        MspError: the model is not packed or has coded values; the teacher cannot be read, or it has another vocabulary
            or other shapes; or a model object does not compute in float32.
    """
    trust = options.trust_remote_code
    if _is_object(model):
        _check_object(model)
        manifest, skeleton = manifest_of(model), model
        entries = getattr(model.config, "quantization_config", None)
        recipe = (
            Manifest.from_dict(entries if isinstance(entries, Mapping) else entries.to_dict()).recipe if entries else {}
        )
    else:
        config = read_causal_config(model, trust_remote_code=trust)
        if method_of(config) != QUANT_METHOD:
            raise MspError(f"{model} is not a packed model: prune it first, with msp prune")
        folder = local_folder(str(model))
        manifest = read_manifest(folder)
        recipe, skeleton = manifest.recipe, make_skeleton(config, trust_remote_code=trust)
        tokenizer = read_tokenizer(str(model), folder, trust_remote_code=trust)
    _check_storages(name_of(model), manifest.storages)
    if _is_object(teacher):
        _check_object(teacher)
        dense = teacher
    else:
        config = read_causal_config(teacher, trust_remote_code=trust)
        if method_of(config) == QUANT_METHOD:
            raise UsageError(f"{teacher} is a packed model: the teacher is the dense one that it was pruned from")
        check_dense(str(teacher), config, dequantise=options.dequantise)
        dense = make_skeleton(config, trust_remote_code=trust)
    if any(isinstance(module, SparseLinear) for module in dense.modules()):
        raise UsageError("the teacher has packed linears: it is the dense model that the packed one was pruned from")
    _check_alike(name_of(model), skeleton, name_of(teacher), dense)
    return Pair(model, teacher, skeleton, tokenizer, recipe)


def _is_object(model: Any) -> bool:
    return not isinstance(model, (str, Path))


def name_of(model: Any) -> str:
    """The directory or hub id of a model, or what a model object was loaded from."""
    if not _is_object(model):
        return str(model)
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _check_object(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise MspError(f"{name_of(model)}: {name} is not in memory: load the model without offloading")
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            dtype = dtype_name(parameter.dtype)
            raise MspError(f"{name_of(model)}: {name} is {dtype}, and recovery trains in float32: load the model in it")


def _check_storages(name: str, storages: Mapping[str, Storage]) -> None:
    for linear, storage in storages.items():
        if storage.is_coded:
            raise MspError(f"{name}: {linear} is stored as {storage}, and recovery of coded values is not built")


def _check_alike(name: str, student: nn.Module, other: str, teacher: nn.Module) -> None:
    """Raise ``MspError`` for a teacher that has another vocabulary, or other shapes, than the packed model."""
    sizes = vocabulary_size(student), vocabulary_size(teacher)
    if sizes[0] != sizes[1]:
        raise MspError(f"{other} has a vocabulary of {sizes[1]}, and {name} one of {sizes[0]}: it cannot teach it")
    ours, theirs = _dense_shapes(student), _dense_shapes(teacher)
    for tensor in sorted(ours.keys() | theirs.keys()):
        if ours.get(tensor) != theirs.get(tensor):
            found, needed = (list(shapes[tensor]) if tensor in shapes else "absent" for shapes in (theirs, ours))
            raise MspError(
                f"{other}: {tensor} is {found}, and {needed} in {name}: the teacher must be the dense model that the "
                "packed one was pruned from"
            )


def _dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters; a packed linear counts as its dense weight."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, SparseLinear) or own == "bias":
                transposed = own == "weight" and isinstance(module, Conv1D)
                found[f"{name}.{own}"] = tuple(parameter.shape[::-1] if transposed else parameter.shape)
        if isinstance(module, SparseLinear):
            found[f"{name}.weight"] = (module.out_features, module.in_features)
    return found
