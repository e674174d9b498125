"""What ``msp info`` says of a model, from its configuration and file headers alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from msp.errors import MspError
from msp.loading import make_skeleton, read_config, stored_dtype
from msp.manifest import QUANT_METHOD
from msp.model import find_structure
from msp.packed_files import read_info
from msp.patterns import GROUP_SIZES
from msp.report import figures_report, kinds_report, merge_experts, packed_report


def describe(model: str) -> tuple[dict[str, Any], RenderableType]:
    """``(data, report)`` of a dense or packed model.

    Raises:
        MspError: not a model, not causal, or a packed model whose files do not fit together.
    """
    config = read_config(model)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and _method(quantization) == QUANT_METHOD:
        packed = read_info(_local(model))
        return {"packed": True, **packed.to_dict()}, packed_report(packed)
    return _describe_dense(model, config)


def _method(quantization: Any) -> Any:
    return quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method


def _local(model: str) -> Path:
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))


def _describe_dense(model: str, config: Any) -> tuple[dict[str, Any], RenderableType]:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MspError(f"{model} is a {config.model_type} model, which is not a causal language model")
    skeleton = make_skeleton(config)
    structure = find_structure(skeleton)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    dtype = stored_dtype(config)
    kinds: dict[tuple[str, tuple[int, int]], int] = defaultdict(int)
    for linear in structure.linears:
        kinds[merge_experts(linear.kind), linear.shape] += 1
    rows = [
        {
            "kind": kind,
            "shape": list(shape),
            "count": count,
            "weights": count * shape[0] * shape[1],
            "group_sizes": [size for size in GROUP_SIZES if shape[1] % size == 0],
        }
        for (kind, shape), count in kinds.items()
    ]
    figures = {
        "model": model,
        "architecture": type(skeleton).__name__,
        "parameters": parameters,
        "bytes": parameters * dtype.itemsize,
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": len(structure.blocks),
        "prunable_weights": sum(int(row["weights"]) for row in rows),  # type: ignore[call-overload]
        "context": getattr(config, "max_position_embeddings", None),
    }
    data = {"packed": False, **figures, "linears": rows, "not_linear": dict(structure.not_linear)}
    parts: list[RenderableType] = [figures_report(figures), kinds_report(rows)]
    if structure.not_linear:
        parts.append(figures_report({"stays_dense": structure.not_linear}))
    return data, Group(*parts)
