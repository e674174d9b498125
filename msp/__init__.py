"""Mixed Sparsity Pruning: N:M sparsity with a different N for every layer.

``import msp`` is quick and lets ``transformers`` load packed models; torch is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from msp.integrations import register_with_peft, register_with_transformers
from msp.namesake import warn_of_namesake

if TYPE_CHECKING:
    from msp.checkpoint import replace_linears, save_packed
    from msp.dense import export_dense
    from msp.errors import MspError, UsageError
    from msp.loading import load_model
    from msp.packed_files import PackedInfo, read_info, validate_packed
    from msp.pareto_curve import pareto
    from msp.patterns import Allocation, Budget, NMPattern
    from msp.pipeline import compare, prune
    from msp.results import CompareResult, ParetoResult, PruneResult, SearchResult
    from msp.sparse_linear import SparseLinear, fast_decode, fast_prefill

__version__ = "0.1.0"

_HOME = {
    "Allocation": "msp.patterns",
    "Budget": "msp.patterns",
    "CompareResult": "msp.results",
    "MspError": "msp.errors",
    "NMPattern": "msp.patterns",
    "PackedInfo": "msp.packed_files",
    "ParetoResult": "msp.results",
    "PruneResult": "msp.results",
    "SearchResult": "msp.results",
    "SparseLinear": "msp.sparse_linear",
    "UsageError": "msp.errors",
    "compare": "msp.pipeline",
    "export_dense": "msp.dense",
    "fast_decode": "msp.sparse_linear",
    "fast_prefill": "msp.sparse_linear",
    "load_model": "msp.loading",
    "pareto": "msp.pareto_curve",
    "prune": "msp.pipeline",
    "read_info": "msp.packed_files",
    "replace_linears": "msp.checkpoint",
    "save_packed": "msp.checkpoint",
    "validate_packed": "msp.packed_files",
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
