"""LoRA on packed linears through peft: importing this module registers it.

peft looks up a method's tuner in ``PEFT_TYPE_TO_TUNER_MAPPING``, for new adapters as for saved ones. This module
replaces the tuner for LoRA there by a subclass that supports packed linears. The custom modules of a ``LoraConfig``
would not be enough: each config object has its own and does not save them, so an adapter could not be loaded by its
name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
from torch import Tensor, nn

from msp.errors import MspError
from msp.packed.sparse_linear import SparseLinear

# The other initialisations write to the weight of the base layer.
INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal")


class SparseLoraLinear(LoraLinear):  # type: ignore[misc]
    """LoRA on a ``SparseLinear``: ``y = x W^T + b + scaling * x A^T B^T``.

    The adapter alone is dense: unmerged, it also has products at positions where ``W`` keeps nothing. Merged, it
    changes the kept values only: ``W + mask * scaling * B A``, in the storage of ``W``. The earlier values are kept as
    long as an adapter is merged, and ``unmerge`` restores them bit for bit.

    Raises:
        MspError: the base layer is offloaded, or its weight stands at several places; or see ``update_layer``.
    """

    unmerged_values: Tensor | None
    unmerged_bias: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        assert isinstance(base_layer, SparseLinear)
        if base_layer.places > 1:
            name = kwargs.get("target_name") or "a packed linear"
            raise MspError(
                f"{name}: its weight stands at {base_layer.places} places; an adapter would be at one of them"
            )
        if base_layer.storage.is_coded:
            name = kwargs.get("target_name") or "a packed linear"
            raise MspError(f"{name}: it is stored in {base_layer.storage}, into which no adapter can be merged")
        if base_layer.is_offloaded:
            name = kwargs.get("target_name") or "a packed linear"
            raise MspError(f"{name}: its weights are offloaded, not in memory; load the whole model to adapt it")
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # packed weights are [out, in], those of a Conv1D too
        self.register_buffer("unmerged_values", None, persistent=False)
        self.register_buffer("unmerged_bias", None, persistent=False)

    @property
    def lora_variants(self) -> Mapping[tuple[str, ...], None]:
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, SparseLinear)
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            MspError: an initialisation or a variant of LoRA that writes to the dense weight, such as PiSSA or DoRA.
        """
        name = kwargs.get("target_name") or "a packed linear"
        if config.init_lora_weights not in INITIAL_WEIGHTS:
            known = ", ".join(map(repr, INITIAL_WEIGHTS))
            raise MspError(f"{name}: init_lora_weights is {config.init_lora_weights!r}; a packed linear takes {known}")
        try:
            self.resolve_lora_variant(config=config)
        except ValueError as error:
            raise MspError(f"{name}: a packed linear takes plain LoRA, without variants: {error}") from error
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the kept values; the storage stays as it is.

        Raises:
            ValueError: with ``safe_merge``, values that would not be finite; nothing is merged then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        packed, bias = base.packed, base.bias
        # summed in the wider of both dtypes, rounded once
        deltas = [self.get_delta_weight(name)[packed.kept()].view(packed.values.shape) for name in names]
        values = _sum(packed.values, deltas)
        biases = [self.lora_B[name].bias * self.scaling[name] for name in names if self.lora_bias[name]]
        if biases and bias is None:
            raise MspError("an adapter with lora_bias cannot be merged into a packed linear without bias")
        new_bias = _sum(bias, biases) if biases else None
        if safe_merge and not all(part.isfinite().all() for part in (values, new_bias) if part is not None):
            raise ValueError(f"merging {', '.join(names)} gives values that are not finite")
        if not self.merged:
            self.unmerged_values = packed.values.detach()
            self.unmerged_bias = None if bias is None else bias.detach()
        base.set_values(values)
        if new_bias is not None:
            base.bias = nn.Parameter(new_bias, requires_grad=bias.requires_grad)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        base.set_values(self.unmerged_values)
        if self.unmerged_bias is not None:
            base.bias = nn.Parameter(self.unmerged_bias, requires_grad=base.bias.requires_grad)
        self.unmerged_values = self.unmerged_bias = None
        self.merged_adapters.clear()


def _sum(start: Tensor, terms: list[Tensor]) -> Tensor:
    """Rounded once, from the widest of the dtypes."""
    total = start.detach()
    for term in terms:
        total = total + term.detach()
    return total.to(start.dtype)


_LoraModel: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]


class SparseLoraModel(_LoraModel):  # type: ignore[misc]
    """peft's tuner for LoRA, which also finds packed linears, by name and as part of ``all-linear``."""

    _all_linear = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        targets = self.peft_config[adapter_name].target_modules
        self._all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: LoraConfig, model_config: Any) -> LoraConfig:
        # the meaning of all-linear for the architecture (experts, say) is settled already at this point
        if self._all_linear:
            peft_config = _maybe_include_all_linear_layers(peft_config, self.model)
            modules = dict(self.model.named_modules())
            packed = {name for name, module in modules.items() if isinstance(module, SparseLinear)}
            # linears that have an adapter already are found as its layer
            adapted = {f"{name}.base_layer" for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
            peft_config.target_modules = {*peft_config.target_modules, *(packed - adapted)}
        return super()._prepare_adapter_config(peft_config, model_config)

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, SparseLinear) and kwargs.get("parameter_name") is None:
            return SparseLoraLinear(target, adapter_name, lora_config, **kwargs)
        created: nn.Module = _LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        return created


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = SparseLoraModel
