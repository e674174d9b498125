"""Checks that a model's weights are plain tensors in memory, which can be read, replaced and packed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from msp.base.outputs import QUANT_METHOD
from msp.base.readable import dtype_name
from msp.errors import MspError
from msp.formats.packed_weight import VALUE_DTYPES
from msp.models.loading import LoadedModel
from msp.models.quantised import method_of
from msp.packed.sparse_linear import SparseLinear


def check_prunable(loaded: LoadedModel) -> None:
    """Check a model that is to be pruned, or measured for that.

    Raises:
        MspError: one that is packed, quantised, or stored in float64; one with adapters, masks or parametrizations;
            or, of a model object, one that is offloaded.
    """
    model, source = loaded.model, loaded.source
    method = method_of(model.config)
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise MspError(f"{source} is packed already; start from the dense model")
    if method not in (None, QUANT_METHOD):
        raise MspError(f"{source} is quantised ({method}): start from the model that it was made of, or dequantise it")
    _check_modules(source, model, whole=loaded.folder is None)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and loaded.stored.of(name) not in VALUE_DTYPES:
            raise MspError(
                f"{source}: {name} is {dtype_name(loaded.stored.of(name))}, and weights can be "
                f"{', '.join(map(dtype_name, VALUE_DTYPES))}: convert the model first, model.to(torch.float32) say"
            )
        if not parameter.is_floating_point():
            raise MspError(
                f"{source}: {name} is {dtype_name(parameter.dtype)}, a quantised weight: start from the dense model"
            )
    if loaded.folder is None:
        _check_in_memory(source, model)


def _check_modules(source: str, model: Any, whole: bool) -> None:
    """``whole``: somebody may have changed the model since it was made, not its linears alone."""
    for name, module in model.named_modules():
        if any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__):
            where = f"{name} is" if name else "it is"
            raise MspError(
                f"{source} has adapters ({where} a {type(module).__name__} of peft): merge them first, with "
                "merge_and_unload()"
            )
        is_linear = isinstance(module, (nn.Linear, Conv1D))
        if (whole or is_linear) and parametrize.is_parametrized(module):
            raise MspError(
                f"{source}: {name} has parametrizations: make them permanent first, with "
                "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
            )
        if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise MspError(
                f"{source}: {name} has a mask of torch.nn.utils.prune: make it permanent first, with "
                'torch.nn.utils.prune.remove(module, "weight")'
            )
        if is_linear and "weight" not in module._parameters:
            raise MspError(f"{source}: the weight of {name} is computed from other tensors: make it a parameter first")


def _check_in_memory(source: str, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise MspError(
                f"{source}: {name} is not in memory: load the model without offloading, or give its directory (and "
                "stream, if it does not fit)"
            )
