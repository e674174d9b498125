"""Loads packed models through ``transformers``: the quantizer that it knows as ``msp``.

Importing this module registers it. It is imported while transformers itself still is being imported,
so whatever needs torch modules or transformers' models is imported inside the methods.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from msp.errors import MspError
from msp.manifest import QUANT_METHOD, Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from msp.packed_files import TensorHeader


class MspConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed model; its attributes are the keys of ``Manifest.to_dict``.

    Raises:
        MspError: an entry that is wrong; the message names it.
    """

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(Manifest.from_dict(entries).to_dict())

    @property
    def manifest(self) -> Manifest:
        return Manifest.from_dict(self.to_dict())


class MspQuantizer(HfQuantizer):
    """Puts packed linears in the place of the allocated ones and checks what is loaded into them."""

    quantization_config: MspConfig
    _headers: Mapping[str, TensorHeader]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise MspError("a dense model is not packed by loading it: prune it with msp.prune")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from msp.as_loaded import names_as_loaded
        from msp.packed_files import check_headers, read_headers
        from msp.sparse_linear import SparseLinear, find_linear, note_pattern

        if not checkpoint_files:
            raise MspError("a packed model is loaded from its safetensors files, not from a state dict")
        manifest = self.quantization_config.manifest
        manifest = manifest.renamed({name: _name_in(model, name) for name in manifest.patterns})
        for name, pattern in manifest.patterns.items():
            linear = find_linear(model, name, manifest.shapes[name])
            if pattern.is_dense:
                note_pattern(linear, pattern)
                continue
            rows, columns = manifest.shapes[name]
            has_bias, dtype = linear.bias is not None, linear.weight.dtype
            sparse = SparseLinear(columns, rows, pattern, has_bias, device="meta", dtype=dtype)
            model.set_submodule(name, sparse)
        headers = read_headers(checkpoint_files)
        names = names_as_loaded(model, headers, self)
        self._headers = {name: headers[stored] for stored, loaded, _ in names for name in loaded}
        check_headers(manifest, self._headers)
        _check_complete(model, self._headers)
        self.quantization_config = MspConfig(**manifest.to_dict())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from msp.ops import PackedWeight
        from msp.packed_files import read_tensor
        from msp.sparse_linear import SparseLinear

        for name, module in model.named_modules():
            if not isinstance(module, SparseLinear):
                continue
            module.requires_grad_(False)
            packed = module.packed
            if packed.values.is_meta or packed.bitmask.is_meta:  # offloaded: what will be read is in the files
                values, bitmask = (read_tensor(self._headers, f"{name}.{kind}") for kind in ("values", "bitmask"))
                packed = PackedWeight(values, bitmask, packed.pattern, packed.shape)
            packed.check(name)
            module.settle()
        del self._headers

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed linears to whatever trains before them, such as adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The kept values are frozen after loading but can be trained; the positions stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, manifest: Manifest) -> None:
    """Make a model whose linears were packed in memory one that ``save_pretrained`` writes as packed."""
    config = MspConfig(**manifest.to_dict())
    model.config.quantization_config = config
    model.hf_quantizer = MspQuantizer(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True


def _name_in(model: PreTrainedModel, name: str) -> str:
    """The linear ``name`` as ``model`` calls it: with or without the prefix of a model inside a head."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise MspError(f"quantization_config: allocation of {name}: {type(model).__name__} has no such linear")


def _check_complete(model: PreTrainedModel, stored: Mapping[str, TensorHeader]) -> None:
    """Raise ``MspError`` naming a tensor that transformers would leave at random values.

    A head that the checkpoint was not saved with (a classifier on a language model) may be new.
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
