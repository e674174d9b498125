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
    from msp.session.results import CompareResult, ParetoResult, PruneResult, SearchResult
    from msp.verbs.pareto_curve import pareto
    from msp.verbs.pipeline import compare, prune

__version__ = "0.1.0"

_HOME = {
    "Allocation": "msp.formats.patterns",
    "Budget": "msp.plan.budget",
    "CompareResult": "msp.session.results",
    "MspError": "msp.errors",
    "NMPattern": "msp.formats.patterns",
    "PackedInfo": "msp.packed.info",
    "ParetoResult": "msp.session.results",
    "PruneResult": "msp.session.results",
    "SearchResult": "msp.session.results",
    "SparseLinear": "msp.packed.sparse_linear",
    "UsageError": "msp.errors",
    "compare": "msp.verbs.pipeline",
    "export_dense": "msp.packed.dense",
    "fast_decode": "msp.packed.sparse_linear",
    "fast_prefill": "msp.packed.sparse_linear",
    "load_model": "msp.models.loading",
    "pareto": "msp.verbs.pareto_curve",
    "prune": "msp.verbs.pipeline",
    "read_info": "msp.packed.info",
    "replace_linears": "msp.packed.checkpoint",
    "save_packed": "msp.packed.checkpoint",
    "validate_packed": "msp.packed.info",
}

__all__ = [
    "Allocation",
    "Budget",
    "CompareResult",
    "MspError",
    "NMPattern",
    "PackedInfo",
    "ParetoResult",
    "PruneResult",
    "SearchResult",
    "SparseLinear",
    "UsageError",
    "__version__",
    "compare",
    "export_dense",
    "fast_decode",
    "fast_prefill",
    "load_model",
    "pareto",
    "prune",
    "read_info",
    "replace_linears",
    "save_packed",
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
