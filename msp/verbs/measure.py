"""Measure how long the linears of a model take to decode a token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msp.base.outputs import QUANT_METHOD, check_file
from msp.base.progress import Progress
from msp.errors import MspError
from msp.evidence.decode_times import measure_decode
from msp.models.loading import DTYPES, check_dtype, find_device, make_skeleton, read_config, stored_dtype
from msp.models.quantised import check_dense, dequantised_dtype, method_of
from msp.models.structure import find_structure
from msp.plan.decode_table import DecodeTable
from msp.plan.plans import PatternRules
from msp.session.arguments import MeasureArguments
from msp.session.declarations import completed, documented

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(MeasureArguments)
def measure(
    model: str | Path,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **arguments: Unpack[MeasureArguments],
) -> DecodeTable:
    """The decode table of a model, for ``budget_decode``; no weight is read. Errors are those of ``prune``.

    The dtype ``auto`` is the dtype of most stored weights, in which the packed model computes.

    Args:
        model: a directory or a hub id.
        output: the file to write the table to. An existing file is replaced if it is a decode table.
        progress: the progress display.
        arguments: the options that are listed below.
    """
    asked = completed(arguments, MeasureArguments)
    rules = PatternRules.parse(asked["group_size"], asked["patterns"], asked["keep"], compliant=asked["compliant"])
    if output is not None:
        check_file(output)
        if Path(output).is_file():
            DecodeTable.load(output)
    place, dtype, trust = find_device(asked["device"]), asked["dtype"], asked["trust_remote_code"]
    check_dtype(dtype)
    config = read_config(model, trust_remote_code=trust)
    if method_of(config) == QUANT_METHOD:
        raise MspError(f"{model} is packed; measure with the dense model")
    quantised = check_dense(str(model), config, dequantise=asked["dequantise"])
    stored = DTYPES[dtype] or (dequantised_dtype(config) if quantised else stored_dtype(model, config))
    skeleton = make_skeleton(config, trust_remote_code=trust)
    shapes = [linear.shape for linear in find_structure(skeleton).linears]
    table = measure_decode(shapes, rules.patterns, dtype=stored, device=place, progress=progress)
    if output is not None:
        table.save(Path(output))
    return table
