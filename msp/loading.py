"""Loads a causal LM, its tokenizer and its configuration, from a directory or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from msp.errors import MspError, UsageError, first_line
from msp.ops import check_environment


@dataclass
class LoadedModel:
    """A causal LM ready to work on, where it came from, and the dtype its weights had on disk."""

    model: Any
    tokenizer: Any
    source: str
    stored_dtype: torch.dtype


def load_model(source: str | Path, *, dtype: str = "auto", device: str | torch.device = "cpu") -> LoadedModel:
    """Load a causal LM and its tokenizer from a directory or a hub id; safetensors only.

    Args:
        source: a directory, a hub id, or a packed model.
        dtype: ``auto`` computes in float32 on a CPU (16-bit matrix products are slow or inaccurate
            there) and in the checkpoint's own dtype elsewhere; or ``float32``, ``bfloat16``, ``float16``.
        device: where the whole model is put. Calibration moves single blocks itself.

    Raises:
        MspError: not a model, not causal, weights missing or not safetensors.
        UsageError: an unknown dtype.
    """
    path = str(source)
    check_dtype(dtype)
    config = read_causal_config(path)
    wanted = computing_dtype(config, dtype, device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
        model, report = loaded
    except MspError:
        raise
    except Exception as error:  # the loaders underneath raise many kinds, none of them ours
        raise MspError(f"{path}: cannot load the weights: {first_line(error)}") from error
    if report["missing_keys"]:
        first, *others = sorted(report["missing_keys"])
        more = f" and {len(others)} more" if others else ""
        raise MspError(f"{path}: weights are missing and would be random: {first}{more}")
    return LoadedModel(model.to(device).eval(), read_tokenizer(path), path, stored_dtype(config))


def check_dtype(dtype: str) -> None:
    """Raise ``UsageError`` for a name that ``load_model`` does not take."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def stored_dtype(config: Any) -> torch.dtype:
    """What the weights are on disk, as ``config`` says."""
    dtype: torch.dtype = getattr(config, "dtype", None) or torch.float32
    return dtype


def computing_dtype(config: Any, dtype: str, device: str | torch.device) -> torch.dtype:
    """What ``dtype``, as ``load_model`` takes it, comes to."""
    is_packed = getattr(config, "quantization_config", None) is not None
    in_fp32 = torch.device(device).type == "cpu" and not is_packed
    return DTYPES[dtype] or (torch.float32 if in_fp32 else stored_dtype(config))


def read_tokenizer(path: str) -> Any:
    """The tokenizer beside a model, None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None


def read_config(source: str | Path) -> Any:
    """The configuration of a model, from a directory or the hub; ``MspError`` if there is none that can be read."""
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise MspError(f"{source} is not a model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise MspError(f"{source} is not a model that transformers can read: {first_line(error)}") from error


def read_causal_config(source: str | Path) -> Any:
    """``read_config`` of what must be a causal LM; ``MspError`` for anything else."""
    config = read_config(source)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not _names_causal_lm(config.architectures):
        raise MspError(f"{source} is a {config.model_type} model, which is not a causal language model")
    return config


def make_skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A causal LM with the shapes of ``config`` and no weights; their dtype is that of ``config`` or another."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MspError(f"a {config.model_type} model is not a causal language model")
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return factory.from_config(config, **({} if dtype is None else {"dtype": dtype}))


def _names_causal_lm(architectures: list[str] | None) -> bool:
    """Whether a config's ``architectures``, where it has any, name a causal LM.

    An encoder (``BertForMaskedLM``) has a causal class too, but attends to both sides under it.
    """
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _as_tuple(names)}
    return not architectures or any(name in known or name.endswith("ForCausalLM") for name in architectures)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda:1`` or the like; ``auto`` is a GPU where there is one.

    Raises:
        UsageError: a device that torch does not know or see, or that the environment rules out.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UsageError(f"device {name!r} is not known to torch") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no GPU")
    check_environment(device.type)
    return device
