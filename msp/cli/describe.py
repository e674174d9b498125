"""The report of ``msp info`` on a model, from its configuration and file headers alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from msp.base.outputs import QUANT_METHOD
from msp.errors import MspError, UsageError
from msp.formats.patterns import GROUP_SIZES
from msp.models.loading import (
    config_entries,
    is_causal,
    local_folder,
    make_skeleton,
    read_config,
    stored_bytes,
    stored_dtype,
)
from msp.models.quantised import dequantised_dtype, method_of
from msp.models.structure import find_structure
from msp.packed.info import read_info, validate_packed
from msp.show.report import figures_report, kinds_report, merge_experts, packed_report, skipped_report


def describe(
    model: str, *, trust_remote_code: bool = False, verify: bool = False
) -> tuple[dict[str, Any], RenderableType]:
    """``(data, report)`` of a dense or packed model.

    Args:
        verify: read all weights of a packed model too, and compare their hashes.

    Raises:
        MspError: it is not a model or not causal, needs its own code, or its packed files do not fit together.
    """
    quantization = config_entries(model).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        folder = local_folder(model)
        packed = validate_packed(folder) if verify else read_info(folder)
        data = {"packed": True, **({"verified": True} if verify else {}), **packed.to_dict()}
        if not verify:
            return data, packed_report(packed)
        return data, Group(
            packed_report(packed),
            Text(
                "Every tensor is as it was saved."
                if packed.manifest.hashes
                else "Every tensor fits the format; there are no hashes to compare."
            ),
        )
    if verify:
        raise UsageError(f"{model} is not a packed model: only packed ones have hashes to verify")
    return _describe_dense(model, read_config(model, trust_remote_code=trust_remote_code), trust_remote_code)


def _describe_dense(model: str, config: Any, trust_remote_code: bool) -> tuple[dict[str, Any], RenderableType]:
    if not is_causal(config, trust_remote_code):
        raise MspError(f"{model} is a {config.model_type} model, which is not a causal language model")
    method = method_of(config)
    skeleton = make_skeleton(config, trust_remote_code=trust_remote_code)
    structure = find_structure(skeleton)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    dtype = dequantised_dtype(config) if method else stored_dtype(model, config)
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
        "bytes": stored_bytes(model, parameters * dtype.itemsize),
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": len(structure.blocks),
        "prunable_weights": sum(int(row["weights"]) for row in rows),  # type: ignore[call-overload]
        **({"quantised": method} if method else {}),
        "context": getattr(config, "max_position_embeddings", None),
    }
    data = {"packed": False, **figures, "linears": rows, "skipped": structure.skipped}
    parts: list[RenderableType] = [figures_report(figures), kinds_report(rows)]
    if structure.skipped:
        parts.append(skipped_report(structure.skipped))
    return data, Group(*parts)
