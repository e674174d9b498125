"""Finds the blocks and linears of any Hugging Face causal LM, by structure alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from msp.errors import MspError, UsageError
from msp.ops import check_environment


@dataclass(frozen=True)
class Linear:
    """A prunable matrix: an ``nn.Linear``, or GPT-2's ``Conv1D`` seen transposed.

    ``kind`` is the name inside the block (``self_attn.q_proj``), ``block`` the block's index.
    """

    name: str
    kind: str
    block: int
    module: nn.Module

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as ``[out_features, in_features]``; shares memory with the module."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach().t() if self.transposed else weight.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return None if bias is None else bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns


@dataclass(frozen=True)
class Block:
    """One transformer block: its module path, its module, its linears in definition order."""

    index: int
    name: str
    module: nn.Module
    linears: tuple[Linear, ...]

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within the context the block's weights are on ``device``."""
        home = device_of(self.module)
        self.module.to(device)
        try:
            yield
        finally:
            self.module.to(home)


@dataclass(frozen=True)
class Structure:
    """The blocks of a model, and the weights inside them that are no linear (name -> reason)."""

    blocks: tuple[Block, ...]
    not_linear: Mapping[str, str] = field(default_factory=dict)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)


def find_structure(model: nn.Module) -> Structure:
    """The transformer blocks of ``model`` and the linears inside them.

    The blocks are the outermost ``nn.ModuleList`` whose members hold the most linear weights, all
    members of one class or several (hybrid models mix them).

    Raises:
        MspError: if no list of modules with linears exists.
    """
    candidates = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module)
        for name, module in candidates
        if not any(name.startswith(other + ".") for other, _ in candidates if other != name)
    ]
    weights = {name: sum(_linear_sizes(module)) for name, module in outermost}
    if not any(weights.values()):
        raise MspError(f"{type(model).__name__} has no list of transformer blocks with linears")
    list_name, block_list = max(outermost, key=lambda item: weights[item[0]])

    blocks, not_linear, seen = [], {}, set()
    for index, module in enumerate(block_list):
        block_name = f"{list_name}.{index}"
        linears = []
        for kind, child in module.named_modules():
            if _is_linear(child):
                if id(child.weight) not in seen:
                    seen.add(id(child.weight))
                    linears.append(Linear(f"{block_name}.{kind}", kind, index, child))
                continue
            for parameter_name, parameter in child.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    path = ".".join(filter(None, (block_name, kind, parameter_name)))
                    shape = list(parameter.shape)
                    not_linear[path] = f"a {shape} parameter of {type(child).__name__}, not a linear"
        blocks.append(Block(index, block_name, module, tuple(linears)))
    return Structure(tuple(blocks), not_linear)


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``x W^T + b`` and nothing else.

    A subclass of ``nn.Linear`` (a router that returns a tuple, a scaled projection) may compute
    something else under the same weight, so it is asked: one probe against the plain formula.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if module.weight.is_meta:
        try:  # one of the class that has weights to be asked
            module = type(module)(8, 8, bias=module.bias is not None)
        except TypeError:
            return False
    probe = torch.linspace(-1, 1, module.in_features, device=module.weight.device, dtype=module.weight.dtype)
    with torch.no_grad():
        try:
            found = module(probe[None])
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        expected = nn.functional.linear(probe[None], module.weight, module.bias)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def _linear_sizes(module: nn.Module) -> list[int]:
    return [child.get_parameter("weight").numel() for child in module.modules() if _is_linear(child)]


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
        raise MspError(f"{path}: cannot load the weights: {_first_line(error)}") from error
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
        raise MspError(f"{source} is not a model that transformers can read: {_first_line(error)}") from error


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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; a model is on one device here."""
    return next(model.parameters()).device


def check_finite(linears: tuple[Linear, ...]) -> None:
    """Raise ``MspError`` naming the first linear with NaN or infinite weights, and how many."""
    for linear in linears:
        finite = torch.isfinite(linear.weight)
        if not finite.all():
            count = int(finite.numel() - finite.sum())
            raise MspError(f"{linear.name}: {count} of its {finite.numel()} weights are NaN or infinite")
