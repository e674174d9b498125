"""From packed back to dense: the same model with its zeros stored, for whatever does not know the packed format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from msp.base.outputs import check_room, new_folder
from msp.base.readable import dtype_name
from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.models.loading import load_model
from msp.models.travelling import edit_config
from msp.packed.auto_map import FILE as LOADER_FILE
from msp.packed.checkpoint import as_stored
from msp.packed.info import read_info
from msp.packed.model_card import dense_card
from msp.packed.sparse_linear import SparseLinear

# What an export writes itself, or what tells of the packed model.
NOT_COPIED = {"README.md", "config.json", LOADER_FILE, "model.safetensors.index.json", "pictures"}


def unpack_linears(model: nn.Module) -> None:
    """Put an ``nn.Linear``, or a ``Conv1D`` where the architecture has one, in the place of each packed linear.

    Weights keep dtype and device and can be trained; what is not kept is zero in them.

    Raises:
        MspError: a linear whose weights are not in memory, or that has an adapter; nothing is replaced then.
    """
    # a module, or a weight, that stands in several places is one in all of them afterwards
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseLinear)]
    for name, linear in found:
        if linear.is_offloaded:
            raise MspError(f"{name}: its weights are offloaded, not in memory; load the whole model to unpack it")
        if name.endswith(".base_layer"):
            raise MspError(f"{name}: it has an adapter; call merge_and_unload or unload first")
    weights: dict[int, nn.Parameter] = {}
    modules: dict[int, nn.Module] = {}
    for name, linear in found:
        if id(linear) not in modules:
            if linear.identity not in weights:
                weight = linear.weight.detach()
                weights[linear.identity] = nn.Parameter(weight.t().contiguous() if linear.conv1d else weight)
            modules[id(linear)] = _dense(linear, weights[linear.identity])
        model.set_submodule(name, modules[id(linear)])
    for module in model.modules():
        if isinstance(getattr(module, "pattern", None), NMPattern):
            del module.pattern


def _dense(linear: SparseLinear, weight: nn.Parameter) -> nn.Module:
    rows, columns, bias = linear.out_features, linear.in_features, linear.bias
    conv1d: Callable[[int, int], nn.Module] = Conv1D
    with torch.device("meta"):
        dense = conv1d(rows, columns) if linear.conv1d else nn.Linear(columns, rows, bias is not None)
    dense.weight = weight
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach())
    if hasattr(linear, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(dense, linear._hf_hook)
    return dense.train(linear.training)


def export_dense(
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
) -> Path:
    """Write the packed model at ``source`` to ``output`` as the dense model that computes the same.

    Tensors have the names and shapes that the architecture is published with, and the dtype of the packed model;
    what a program needs beside them (tokenizer, chat template) is copied. All or nothing, as ``save_packed``. The
    whole dense model is in memory meanwhile, in float32.

    Args:
        trust_remote_code: as in ``load_model``.

    Returns:
        The directory written, links resolved.

    Raises:
        MspError: ``source`` is not a packed model, or the same as ``output``; or see ``save_packed``.
    """
    source = Path(source)
    info = read_info(source)
    if Path(output).resolve() == source.resolve():
        raise MspError(f"{output} is the packed model itself; choose another place for the dense one")
    with new_folder(output, force, model=source) as (partial, target):
        check_room(output, info.dense_bytes + info.other_bytes, "the dense model")
        loaded = load_model(source, dtype="float32", trust_remote_code=trust_remote_code)
        model = loaded.model
        model.dequantize()
        with as_stored(model, loaded.stored):
            model.save_pretrained(partial, max_shard_size=max_shard_size)
        edit_config(partial, dtype=dtype_name(loaded.stored_dtype))
        for file in sorted(source.iterdir()):
            if not _is_left(file, partial):
                copy = shutil.copytree if file.is_dir() else shutil.copy2
                copy(file, partial / file.name)
        (partial / "README.md").write_text(dense_card(info), encoding="utf-8")
    return target


def _is_left(file: Path, partial: Path) -> bool:
    written = (partial / file.name).exists() or file.suffix == ".safetensors"
    return written or file.name in NOT_COPIED or file.name.startswith(".")
