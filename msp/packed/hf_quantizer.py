"""Loads packed models through ``transformers``: the quantizer with the name ``msp``.

Importing this module registers it. It is imported while transformers itself is still being imported, so the methods
import torch modules and transformers' models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from msp.base.outputs import QUANT_METHOD
from msp.errors import MspError
from msp.formats.manifest import Manifest
from msp.packed.auto_map import forget_loader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from msp.base.hashes import Hashing
    from msp.base.safetensors_files import TensorHeader


class MspConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model; its attributes are the keys of ``Manifest.to_dict``.

    Raises:
        MspError: an entry is wrong; the message names it.
    """

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(Manifest.from_dict(entries).to_dict())

    @property
    def manifest(self) -> Manifest:
        return Manifest.from_dict(self.to_dict())


class MspQuantizer(HfQuantizer):
    """Replaces the allocated linears by packed ones and checks the tensors that are loaded into them."""

    quantization_config: MspConfig
    _headers: Mapping[str, TensorHeader]
    _hashing: Hashing | None = None
    _hashes: Mapping[str, str]
    _places: dict[str, Any]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise MspError("a dense model is not packed by loading it: prune it with msp.prune")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from torch import nn

        from msp.base.hashes import Hashing, note_without, wanted
        from msp.base.safetensors_files import read_headers, split_guards
        from msp.models.as_loaded import names_as_loaded
        from msp.packed.coded_linear import new_linear
        from msp.packed.info import check_headers
        from msp.packed.sparse_linear import find_linear, note_pattern, put_in_place

        if not checkpoint_files:
            raise MspError("a packed model is loaded from its safetensors files, not from a state dict")
        manifest = self.quantization_config.manifest
        manifest = manifest.renamed({name: _name_in(model, name) for name in manifest.names})
        linears = {
            name: find_linear(model, name, manifest.shapes[manifest.shared.get(name, name)]) for name in manifest.names
        }
        files = read_headers(checkpoint_files)
        stored, guards = split_guards(files)
        self._places = {name: linears[name] for name in manifest.shared}
        for name, linear in linears.items():
            first = manifest.shared.get(name, name)
            storage, shape = manifest.storages[first], manifest.shapes[first]
            if name != first:  # its weight comes when all are loaded, and its bias too if it is not its own
                place, own = nn.Module(), f"{name}.bias" in stored or f"{first}.bias" not in stored
                place.register_parameter("bias", linear.bias if own else None)
                model.set_submodule(name, place)
            elif storage.is_dense:
                note_pattern(linear, manifest.patterns[first])
            else:
                has_bias, dtype = linear.bias is not None, linear.weight.dtype
                put_in_place(model, name, new_linear(storage, shape, has_bias, device="meta", dtype=dtype))
        _forget_dense(model, manifest)
        names = names_as_loaded(model, stored, self)
        self._headers = {name: stored[own] for own, loaded, _ in names for name in loaded}
        check_headers(manifest, self._headers)
        _check_complete(model, self._headers)
        # transformers would list them as unexpected
        ignored = {f"^{re.escape(name)}$" for _, names, _ in names_as_loaded(model, guards, self) for name in names}
        known = model._keys_to_ignore_on_load_unexpected
        # a set in new releases, but a list (or None) in the first releases of transformers 5
        model._keys_to_ignore_on_load_unexpected = (set if isinstance(known, set) else list)({*(known or ()), *ignored})
        # these are the hashes of the files; a model that is saved again has others, see ``get_state_dict_and_metadata``
        self.quantization_config = MspConfig(**replace(manifest, hashes={}).to_dict())
        self._hashes = manifest.hashes
        if not manifest.hashes:
            note_without(str(Path(checkpoint_files[0]).parent))
        elif wanted():
            self._hashing = Hashing(files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from msp.base.finite import check_finite, named_tensors
        from msp.base.hashes import NAMES
        from msp.base.safetensors_files import read_tensor
        from msp.packed.info import read_packed
        from msp.packed.sparse_linear import SparseLinear, at_places, note_pattern

        if self._hashing is not None:
            self._hashing.compare(self._hashes)
        verified, self._hashing = self._hashing is not None, None

        def stored(name: str) -> torch.Tensor | None:
            return read_tensor(self._headers, name) if name in self._headers else None

        # A tensor with the right hash is as finite as when it was saved, unless it was cast.
        check_finite(
            (
                (name, tensor)
                for name, tensor in named_tensors(model)
                if not verified or name not in self._headers or NAMES.get(tensor.dtype) != self._headers[name].dtype
            ),
            stored,
        )
        for name, module in model.named_modules():
            if not isinstance(module, SparseLinear):
                continue
            module.requires_grad_(False)
            packed = module.packed
            if module.is_offloaded:  # what will be read is in the files
                packed = read_packed(self._headers, name, packed.storage, packed.shape)
            packed.check(name)
        for first, others in self.quantization_config.manifest.places.items():
            names = [first, *others]
            modules = [model.get_submodule(first), *(self._places.pop(name) for name in others)]
            for name, module in zip(others, modules[1:], strict=True):
                bias = model.get_submodule(name).bias
                module.bias = modules[0].bias if bias is None and module.bias is not None else bias
            if isinstance(modules[0], SparseLinear):
                modules = [*at_places(modules[0].packed, modules)]
            else:
                for module in modules[1:]:
                    module.weight = modules[0].weight
                    note_pattern(module, modules[0].pattern)
            for name, module in zip(names, modules, strict=True):
                model.set_submodule(name, module)
        for module in model.modules():
            if isinstance(module, SparseLinear):
                module.settle()
        _tie(model, self.quantization_config.manifest)
        del self._headers
        forget_loader(model.config)
        _keep_names(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The tensors that ``save_pretrained`` writes; for a model with adapters only those of the adapters."""
        from msp.base.hashes import hash_tensors
        from msp.packed.sparse_linear import guarded_state_dict

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        state = guarded_state_dict(model)
        manifest = replace(self.quantization_config.manifest, hashes=hash_tensors(_stored(model, state)))
        self.quantization_config = model.config.quantization_config = MspConfig(**manifest.to_dict())
        return state, {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The masked dense model, in place; without ``dtype`` every weight keeps its own."""
        from msp.packed.dense import unpack_linears

        dense = _dense_names(model)
        unpack_linears(model)
        model._weight_conversions = None  # it is saved under published names again
        tied = dict(model._tied_weights_keys or {})
        model._tied_weights_keys = {
            dense.get(name, name): dense.get(first, first) for name, first in tied.items() if dense.get(name, name)
        }
        if dtype is not None:
            model.to(dtype)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):
                del config._is_quantized
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed linears to trained parts before them, such as adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The kept values are frozen after loading but can be trained; the positions stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _stored(model: PreTrainedModel, state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of ``state`` that ``save_pretrained`` stores: the first of those that are one tensor."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    kept = dict(remove_tied_weights_from_state_dict(dict(state), model))
    return {name: tensor for name, tensor in kept.items() if name not in (model._keys_to_ignore_on_save or ())}


def attach(model: Any, manifest: Manifest) -> None:
    """Prepare a model whose linears were packed in memory, so that ``save_pretrained`` writes it as packed."""
    config = MspConfig(**manifest.to_dict())
    _forget_dense(model, manifest)
    _tie(model, manifest)
    model.config.quantization_config = config
    model.hf_quantizer = MspQuantizer(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    _keep_names(model)


def _keep_names(model: Any) -> None:
    """Let ``save_pretrained`` store tensors under the names of their modules, as the manifest does.

    Published files may merge linears (q, k and v, say), which cannot be done with packed ones.
    """
    model._weight_conversions = []


def _forget_dense(model: PreTrainedModel, manifest: Manifest) -> None:
    """Remove the packed weights from those that transformers ties when it loads."""
    packed = [name for name in manifest.names if not manifest.storages[manifest.shared.get(name, name)].is_dense]
    gone = {f"{name}.weight" for name in (*packed, *manifest.shared)}
    tied = dict(model.all_tied_weights_keys)
    model.all_tied_weights_keys = {name: first for name, first in tied.items() if not gone & {name, first}}


def _tie(model: PreTrainedModel, manifest: Manifest) -> None:
    """Declare the shared tensors of packed linears, because transformers stores one of several equal tensors."""
    keys: dict[str, str] = {}
    for name, first in manifest.shared.items():
        one, other = (dict(model.get_submodule(each).state_dict(keep_vars=True)) for each in (first, name))
        keys |= {f"{name}.{kind}": f"{first}.{kind}" for kind, tensor in one.items() if tensor is other.get(kind)}
    if keys:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **keys}


def _dense_names(model: PreTrainedModel) -> dict[str, str]:
    """The dense name for each part of a packed weight: that of the weight for the first part, else empty."""
    from msp.packed.sparse_linear import SparseLinear

    names: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear):
            first, *others = (f"{name}.{label}" for label in module.parts)
            names |= {first: f"{name}.weight", **dict.fromkeys(others, "")}
    return names


def _name_in(model: PreTrainedModel, name: str) -> str:
    """The linear ``name`` under its name in ``model``: with or without the prefix of a model inside a head."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise MspError(f"quantization_config: allocation of {name}: {type(model).__name__} has no such linear")


def _check_complete(model: PreTrainedModel, stored: Mapping[str, TensorHeader]) -> None:
    """Raise ``MspError`` that names a tensor which transformers would leave at random values.

    A head that the checkpoint lacks (a classifier on a language model) may be new.
    """
    tied = dict(model.all_tied_weights_keys)
    tied.update({source: target for target, source in tied.items()})
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    same_class = type(model).__name__ in (model.config.architectures or ())
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    for name in model.state_dict():
        if name in stored or tied.get(name) in stored or any(pattern.search(name) for pattern in ignored):
            continue
        if same_class or name.startswith(prefix):
            raise MspError(f"{name}: missing from the checkpoint")


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(MspConfig)
    register_quantizer(QUANT_METHOD)(MspQuantizer)
