"""Mixed Sparsity Pruning: N:M sparsity with a different N for every layer.

``import msp`` is quick and lets ``transformers`` load packed models; torch is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from msp.base.namesake import warn_of_namesake
from msp.integrations import register_with_peft, register_with_transformers

if TYPE_CHECKING:
    from msp.errors import MspError, UsageError
    from msp.formats.patterns import Allocation, NMPattern
    from msp.models.loading import load_model
    from msp.packed.checkpoint import replace_linears, save_packed
    from msp.packed.dense import export_dense
    from msp.packed.info import PackedInfo, read_info, validate_packed
    from msp.packed.sparse_linear import SparseLinear, fast_decode, fast_prefill
    from msp.plan.budget import Budget
    from msp.plan.decode_table import DecodeTable
    from msp.session.preview import Preview
    from msp.session.results import (
        CompareResult,
        DenseInfo,
        EvaluateResult,
        ParetoResult,
        PruneResult,
        RecoverResult,
        SearchResult,
        SensitivityResult,
    )
    from msp.verbs.compare import compare
    from msp.verbs.evaluate import evaluate
    from msp.verbs.generate import Completion, generate
    from msp.verbs.info import info
    from msp.verbs.measure import measure
    from msp.verbs.pareto import pareto
    from msp.verbs.prune import dry_run, prune
    from msp.verbs.recover import recover
    from msp.verbs.search import search
    from msp.verbs.sensitivity import sensitivity

__version__ = "0.1.0"

_HOME = {
    "Allocation": "msp.formats.patterns",
    "Budget": "msp.plan.budget",
    "CompareResult": "msp.session.results",
    "Completion": "msp.verbs.generate",
    "DecodeTable": "msp.plan.decode_table",
    "DenseInfo": "msp.session.results",
    "EvaluateResult": "msp.session.results",
    "MspError": "msp.errors",
    "NMPattern": "msp.formats.patterns",
    "PackedInfo": "msp.packed.info",
    "ParetoResult": "msp.session.results",
    "Preview": "msp.session.preview",
    "PruneResult": "msp.session.results",
    "RecoverResult": "msp.session.results",
    "SearchResult": "msp.session.results",
    "SensitivityResult": "msp.session.results",
    "SparseLinear": "msp.packed.sparse_linear",
    "UsageError": "msp.errors",
    "compare": "msp.verbs.compare",
    "dry_run": "msp.verbs.prune",
    "evaluate": "msp.verbs.evaluate",
    "export_dense": "msp.packed.dense",
    "fast_decode": "msp.packed.sparse_linear",
    "fast_prefill": "msp.packed.sparse_linear",
    "generate": "msp.verbs.generate",
    "info": "msp.verbs.info",
    "load_model": "msp.models.loading",
    "measure": "msp.verbs.measure",
    "pareto": "msp.verbs.pareto",
    "prune": "msp.verbs.prune",
    "read_info": "msp.packed.info",
    "recover": "msp.verbs.recover",
    "replace_linears": "msp.packed.checkpoint",
    "save_packed": "msp.packed.checkpoint",
    "search": "msp.verbs.search",
    "sensitivity": "msp.verbs.sensitivity",
    "validate_packed": "msp.packed.info",
}

__all__ = [
    "Allocation",
    "Budget",
    "CompareResult",
    "Completion",
    "DecodeTable",
    "DenseInfo",
    "EvaluateResult",
    "MspError",
    "NMPattern",
    "PackedInfo",
    "ParetoResult",
    "Preview",
    "PruneResult",
    "RecoverResult",
    "SearchResult",
    "SensitivityResult",
    "SparseLinear",
    "UsageError",
    "__version__",
    "compare",
    "dry_run",
    "evaluate",
    "export_dense",
    "fast_decode",
    "fast_prefill",
    "generate",
    "info",
    "load_model",
    "measure",
    "pareto",
    "prune",
    "read_info",
    "recover",
    "replace_linears",
    "save_packed",
    "search",
    "sensitivity",
    "validate_packed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'msp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_namesake()
register_with_transformers()
register_with_peft()
