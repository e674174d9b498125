"""A causal LM whose blocks stay in their safetensors files until they are worked on, one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from msp.errors import MspError
from msp.loading import (
    LoadedModel,
    check_dtype,
    computing_dtype,
    make_skeleton,
    read_causal_config,
    read_tokenizer,
    stored_dtype,
)
from msp.model import Block, Structure, find_structure
from msp.packed_files import read_headers, tensor_files


class StoredWeights:
    """The tensors of a dense checkpoint under the names that ``model`` has for them.

    Raises:
        MspError: a file that is missing or damaged, or a tensor that is not stored just as the model holds it.
    """

    def __init__(self, source: str, model: Any) -> None:
        self._headers = read_headers(tensor_files(_local(source)))
        expected = model.state_dict()
        self._stored = _names(model, expected, list(self._headers))
        tied = model.all_tied_weights_keys
        for name, tensor in expected.items():
            partners = {tied.get(name), *(target for target, origin in tied.items() if origin == name)}
            if name not in self._stored and not partners & self._stored.keys():
                raise MspError(f"{source}: {name} is not stored under its own name: load this model whole")
            if name in self._stored and self._headers[self._stored[name]].shape != tuple(tensor.shape):
                raise MspError(
                    f"{source}: {name} is not stored in the shape {list(tensor.shape)}: load this model whole"
                )

    @property
    def names(self) -> Set[str]:
        return self._stored.keys()

    def fill(
        self, module: nn.Module, prefix: str, device: torch.device, *, copy: bool = False, without: tuple[str, ...] = ()
    ) -> None:
        """Give the tensors of ``module``, called ``prefix`` in the model, what is stored for them.

        Without ``copy`` they are pages of the mapped file where neither dtype nor device changes, and keep all of it
        mapped. Names that begin with one of ``without`` are left as they are.
        """
        by_file: dict[Path, dict[str, torch.dtype]] = defaultdict(dict)
        for name, tensor in module.state_dict().items():
            if prefix + name in self._stored and not (prefix + name).startswith(without):
                by_file[self._headers[self._stored[prefix + name]].file][name] = tensor.dtype
        for file, dtypes in by_file.items():
            with safe_open(file, framework="pt") as reader:
                tensors = {
                    name: reader.get_tensor(self._stored[prefix + name]).to(device, dtype, copy=copy)
                    for name, dtype in dtypes.items()
                }
            module.load_state_dict(tensors, strict=False, assign=True)


@dataclass(frozen=True)
class StoredBlock(Block):
    """A block that has weights only where it is ``on`` a device."""

    weights: StoredWeights

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        self.weights.fill(self.module, f"{self.name}.", device)
        try:
            yield
        finally:
            empty = {name: tensor.to("meta") for name, tensor in self.module.state_dict().items()}
            self.module.load_state_dict(empty, assign=True)


def load_stored(source: str | Path, *, dtype: str = "auto", device: torch.device) -> tuple[LoadedModel, Structure]:
    """``load_model`` for one that does not fit: everything but the blocks is loaded, they are ``StoredBlock``s.

    Raises:
        MspError, UsageError: as ``load_model``; or a checkpoint that transformers converts while it loads it, a
            packed one, or one kept in 16 bits with parts in 32.
    """
    path = str(source)
    check_dtype(dtype)
    config = read_causal_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise MspError(f"{path} is packed or quantised already; start from the dense model")
    stored, computed = stored_dtype(config), computing_dtype(config, dtype, device)
    model = make_skeleton(config, computed).eval()
    in_fp32 = model._keep_in_fp32_modules_strict | (model._keep_in_fp32_modules if computed == torch.float16 else set())
    if in_fp32 and computed != torch.float32:
        raise MspError(f"{path}: {sorted(in_fp32)[0]} is computed in float32 beside {computed}: load this model whole")
    weights = StoredWeights(path, model)
    blocks = find_structure(model)
    for linear in blocks.linears:
        if linear.others:
            raise MspError(f"{path}: {linear.name} and {linear.others[0].name} are one weight: load this model whole")
    if blocks.changes.before:
        raise MspError(f"{path}: a forward changes {min(blocks.changes.before)}: load this model whole")
    if blocks.remembering:
        raise MspError(
            f"{path}: {blocks.remembering[0]} keeps tensors that other blocks may read: load this model whole"
        )
    if blocks.calls is not None and max(blocks.calls) > 1:
        again = next(block.name for block in blocks.blocks if blocks.calls[block.index] > 1)
        raise MspError(f"{path}: a forward runs {again} more than once: load this model whole")
    stored_blocks = [
        StoredBlock(block.index, block.name, block.module, block.linears, weights) for block in blocks.blocks
    ]
    _make_buffers(model, device)
    weights.fill(model, "", device, copy=True, without=tuple(f"{block.name}." for block in stored_blocks))
    model.tie_weights(missing_keys=set(model.state_dict()) - weights.names, recompute_mapping=False)
    return LoadedModel(model, read_tokenizer(path), path, stored), replace(blocks, blocks=tuple(stored_blocks))


def _local(source: str) -> Path:
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))


def _names(model: Any, expected: dict[str, Any], stored: list[str]) -> dict[str, str]:
    """The stored name of every tensor of the model that is stored as it is."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    names = {}
    for name in stored:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if converter is None:
            names[renamed] = name
    return names


def _make_buffers(model: Any, device: torch.device) -> None:
    """Computes the tables that no checkpoint holds (rotary frequencies, say), as transformers does on loading."""
    for module in model.modules():
        names = module._non_persistent_buffers_set
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            with torch.no_grad():
                model._init_weights(module)
