"""A causal LM whose blocks stay in their safetensors files until they are worked on, one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from msp.base.finite import check_finite
from msp.base.outputs import QUANT_METHOD
from msp.base.safetensors_files import TensorHeader
from msp.errors import MspError
from msp.models.as_loaded import StoredDtypes, check_all_taken, most_common, names_as_loaded
from msp.models.loading import (
    LoadedModel,
    check_dtype,
    computing_dtype,
    local_folder,
    make_skeleton,
    narrow_dtype,
    read_causal_config,
    read_tokenizer,
    stored_headers,
)
from msp.models.narrow import compute_in_fp32, computed_dtype, narrow_weights
from msp.models.quantised import check_dense, check_float_weights, method_of
from msp.models.structure import Block, Structure, find_structure


class StoredWeights:
    """The tensors of a dense checkpoint under the names that ``model`` has for them.

    Args:
        headers: of its files.

    Raises:
        MspError: a tensor that is not stored just as the model holds it, or that the model has no place for.
    """

    def __init__(self, source: str, model: Any, headers: Mapping[str, TensorHeader]) -> None:
        self._headers = headers
        self._source = source
        self._checked: set[str] = set()
        expected = model.state_dict()
        names = list(names_as_loaded(model, headers))
        self._stored = {name: own for own, (name, *_), renamed in names if renamed and name in expected}
        tied = model.all_tied_weights_keys
        for name in expected:
            partners = {tied.get(name), *(target for target, origin in tied.items() if origin == name)}
            if name not in self._stored and not partners & self._stored.keys():
                taken = {taken for _, all_taken, renamed in names if not renamed for taken in all_taken}
                if name in taken:
                    raise MspError(f"{source}: {name} is not stored under its own name: load this model whole")
                raise MspError(f"{source}: weights are missing and would be random: {name}")
        for name, own in self._stored.items():
            found, needed = self._headers[own].shape, tuple(expected[name].shape)
            if found != needed:
                raise MspError(
                    f"{source}: cannot load the weights: {name} is stored in the shape {list(found)}, and config.json "
                    f"needs {list(needed)}"
                )
        unknown = {name: headers[own].shape for own, given, _ in names for name in given if name not in expected}
        check_all_taken(source, model, unknown, unknown)

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
                tensors = {}
                for name, dtype in dtypes.items():
                    stored = reader.get_tensor(self._stored[prefix + name])
                    tensors[name] = stored.to(device, dtype, copy=copy)
                    self._check(prefix + name, tensors[name], stored)
            module.load_state_dict(tensors, strict=False, assign=True)

    def _check(self, name: str, tensor: Tensor, stored: Tensor) -> None:
        """Raise ``MspError`` for a tensor that is not finite when it comes for the first time."""
        if name in self._checked:
            return
        try:
            check_finite([(name, tensor)], lambda _: stored)
        except MspError as error:
            raise MspError(f"{self._source}: {error}") from error
        self._checked.add(name)


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


def read_skeleton(
    source: str | Path, *, dtype: str = "auto", device: torch.device, trust_remote_code: bool = False
) -> tuple[LoadedModel, dict[str, TensorHeader]]:
    """The model at ``source`` as ``load_stored`` begins with it: on no device, none of its weights read.

    Returns:
        It, and the headers of its files.

    Raises:
        MspError, UsageError: as ``load_model``; or a packed model.
    """
    path = str(source)
    check_dtype(dtype)
    config = read_causal_config(path, trust_remote_code=trust_remote_code)
    if method_of(config) == QUANT_METHOD:
        raise MspError(f"{path} is packed already; start from the dense model")
    check_dense(path, config)
    folder = local_folder(path)
    tokenizer = read_tokenizer(path, folder, trust_remote_code=trust_remote_code)
    headers = stored_headers(path, folder)
    check_float_weights(path, headers)
    computed = computing_dtype(config, most_common(headers), dtype, device)
    kept = narrow_dtype(headers, computed, device)
    with narrow_weights(kept):
        model = make_skeleton(config, computed, trust_remote_code=trust_remote_code).eval()
    if kept is not None:
        compute_in_fp32(model)
    return LoadedModel(model, tokenizer, path, StoredDtypes.of_files(model, headers), folder), headers


def load_stored(
    source: str | Path, *, dtype: str = "auto", device: torch.device, trust_remote_code: bool = False
) -> tuple[LoadedModel, Structure]:
    """``load_model`` for one that does not fit: everything but the blocks is loaded, they are ``StoredBlock``s.

    Raises:
        MspError, UsageError: as ``load_model``; or a checkpoint that transformers converts while it loads it, a
            packed one, or one kept in 16 bits with parts in 32.
    """
    loaded, headers = read_skeleton(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    path, model = loaded.source, loaded.model
    computed = computed_dtype(model)
    # sets today, but lists or nothing in the first releases of transformers 5
    in_fp32 = {*(model._keep_in_fp32_modules_strict or ())}
    in_fp32 |= {*(model._keep_in_fp32_modules or ())} if computed == torch.float16 else set()
    if in_fp32 and computed != torch.float32:
        raise MspError(f"{path}: {sorted(in_fp32)[0]} is computed in float32 beside {computed}: load this model whole")
    weights = StoredWeights(path, model, headers)
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
    return loaded, replace(blocks, blocks=tuple(stored_blocks))


def _make_buffers(model: Any, device: torch.device) -> None:
    """Computes the tables that no checkpoint holds (rotary frequencies, say), as transformers does on loading."""
    for module in model.modules():
        names = module._non_persistent_buffers_set
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            with torch.no_grad():
                model._init_weights(module)
