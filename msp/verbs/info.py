"""Describe a model from its configuration and file headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp.base.outputs import QUANT_METHOD
from msp.base.readable import dtype_name
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
from msp.models.structure import find_structure, merge_experts
from msp.packed.info import PackedInfo, read_info, validate_packed
from msp.session.arguments import InfoArguments
from msp.session.declarations import completed, documented
from msp.session.results import DenseInfo

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(InfoArguments)
def info(model: str | Path, **arguments: Unpack[InfoArguments]) -> PackedInfo | DenseInfo:
    """Describe a model, dense or packed, without loading its weights.

    Args:
        model: a directory or a hub id.
        arguments: the options that are listed below.

    Raises:
        UsageError: ``verify`` of a model that is not packed.
        MspError: it is not a model or not causal, needs its own code, or its packed files do not fit together.
    """
    asked, source = completed(arguments, InfoArguments), str(model)
    quantization = config_entries(source).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        folder = local_folder(source)
        return validate_packed(folder) if asked["verify"] else read_info(folder)
    if asked["verify"]:
        raise UsageError(f"{model} is not a packed model: only packed ones have hashes to verify")
    return _dense(source, asked["trust_remote_code"])


def _dense(model: str, trust_remote_code: bool) -> DenseInfo:
    config: Any = read_config(model, trust_remote_code=trust_remote_code)
    if not is_causal(config, trust_remote_code):
        raise MspError(f"{model} is a {config.model_type} model, which is not a causal language model")
    method = method_of(config)
    skeleton = make_skeleton(config, trust_remote_code=trust_remote_code)
    structure = find_structure(skeleton)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    dtype = dequantised_dtype(config) if method else stored_dtype(model, config)
    kinds = Counter((merge_experts(linear.kind), linear.shape) for linear in structure.linears)
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
    return DenseInfo(
        model=model,
        architecture=type(skeleton).__name__,
        parameters=parameters,
        bytes=stored_bytes(model, parameters * dtype.itemsize),
        dtype=dtype_name(dtype),
        blocks=len(structure.blocks),
        prunable_weights=sum(count * shape[0] * shape[1] for (_, shape), count in kinds.items()),
        quantised=method,
        context=getattr(config, "max_position_embeddings", None),
        linears=rows,
        skipped=dict(structure.skipped),
    )
