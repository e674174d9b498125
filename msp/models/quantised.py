"""Checkpoints that somebody else's method quantised: how they are told, refused, and computed back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from msp.base.outputs import QUANT_METHOD
from msp.base.safetensors_files import TensorHeader
from msp.errors import MspError
from msp.formats.storage import FLOATS

# Last parts of the names under which methods store weights in integers or in 8 and fewer bits.
WEIGHT_NAMES = ("weight", "qweight", "weight_packed", "blocks")
KEYS = ("quantization_config", "compression_config")


def method_of(config: Any) -> str | None:
    """The name of the method that quantised, or packed, a model with ``config``; None for a dense one."""
    parts = [config, config.get_text_config() if hasattr(config, "get_text_config") else config]
    entries = (getattr(part, key, None) for part in parts for key in KEYS)
    entry = next((entry for entry in entries if entry is not None), None)
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else getattr(entry, "quant_method", None)
    return str(getattr(method, "value", method) or "an unknown method")


def check_dense(source: str, config: Any, *, dequantise: bool = False) -> str | None:
    """Check that ``source`` is not quantised, or is to be dequantised.

    Returns:
        The name of the method that quantised it, None for a dense or a packed model.

    Raises:
        MspError: a quantised model that is not to be dequantised.
    """
    method = method_of(config)
    if method in (None, QUANT_METHOD):
        return None
    if not dequantise:
        raise MspError(
            f"{source} is quantised ({method}), and pruning and figures need 16- or 32-bit weights: start from the "
            "model that it was made of, or dequantise it (dequantise, --dequantise)"
        )
    return method


def check_float_weights(source: str, headers: Mapping[str, TensorHeader]) -> None:
    """Raise ``MspError`` naming a weight in files with ``headers`` that is stored in integers or float8."""
    for name, header in headers.items():
        kind = name.rpartition(".")[2].rpartition("_")[2] if name.endswith("_blocks") else name.rpartition(".")[2]
        if header.dtype not in FLOATS and (header.dtype.startswith("F") or kind in WEIGHT_NAMES):
            raise MspError(
                f"{source}: {name} is stored in {header.dtype}, as a quantised weight, and config.json has no "
                "quantization_config that tells how to read it: start from the model that it was made of"
            )


def dequantising(config: Any) -> tuple[Any, bool]:
    """A copy of ``config`` with which transformers dequantises while it loads, where its method can do so.

    Returns:
        The configuration, and whether the loaded model is still to be dequantised.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = copy.deepcopy(config)
    holder = config if getattr(config, "quantization_config", None) is not None else config.get_text_config()
    entry = getattr(holder, "quantization_config", None)
    if entry is None:
        raise ValueError("transformers does not read a compression_config")
    parsed = AutoQuantizationConfig.from_dict(dict(entry)) if isinstance(entry, Mapping) else entry
    if "dequantize" not in inspect.signature(type(parsed).__init__).parameters:
        return config, True
    parsed.dequantize = True
    holder.quantization_config = parsed.to_dict() | {"dequantize": True}
    return config, False


def dense_again(model: Any, dtype: torch.dtype) -> Any:
    """``model`` without its quantisation, checked, and in ``dtype``, as if it had been loaded dense.

    Raises:
        ValueError: a weight that is not a float tensor.
    """
    for key in KEYS:
        for part in (model.config, model.config.get_text_config()):
            if hasattr(part, key):
                delattr(part, key)
    model.hf_quantizer = None
    model.is_quantized = False
    in_fp32 = tuple(model._get_dtype_plan(dtype))
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS.values():
            raise ValueError(f"{name} is {parameter.dtype} still")
        # What passes a quantizer without being quantised comes in the dtype of the file.
        parameter.data = parameter.data.to(torch.float32 if any(part in name for part in in_fp32) else dtype)
    return model


def dequantised_dtype(config: Any) -> torch.dtype:
    """What weights of a dequantised model are stored in: what ``config`` names, or else bfloat16."""
    dtype = getattr(config, "dtype", None)
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16
