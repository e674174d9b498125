"""The wanted figures of a GPU, and their computation from the rows that name them (``Planned.figures``).

Rows and roofs are dicts, as in the result of ``make gpu-check``. A value is the worst of its rows unless its entry is
another; there is no value if a row lacks an entry that it needs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]
Value = Callable[[Sequence[Entry], Entry], float]


def ratio_to(peer: str, of: Callable[[list[float]], float] = min) -> Value:
    """How many times faster than ``peer``: the row's ``ratio`` under that name."""
    return lambda rows, roofs: of([row["ratio"][peer] for row in rows])


def ratio_to_fastest(*peers: str) -> Value:
    """How many times faster than the fastest of some peers, as a geometric mean."""
    return lambda rows, roofs: geomean([min(row["ratio"][peer] for peer in peers) for row in rows])


def share_of_copy(rows: Sequence[Entry], roofs: Entry) -> float:
    return min(100 * row["gbps"] / roofs["copy_gbps"] for row in rows)


def share_of_dense(rows: Sequence[Entry], roofs: Entry) -> float:
    return min(100 * row["tflops"] / roofs["dense_tflops"] for row in rows)


def largest(name: str) -> Value:
    """The largest ``extra`` with that name."""
    return lambda rows, roofs: max(row["extra"][name] for row in rows)


@dataclass(frozen=True)
class Figure:
    """``op`` is the benchmark that measures it; ``unit`` one of ``x``, ``%`` and ``GB``."""

    op: str
    what: str
    against: str
    wanted: float
    unit: str
    value: Value
    at_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.wanted if self.at_most else value >= self.wanted


geomean = statistics.geometric_mean

FIGURES = {
    "select-bandwidth": Figure(
        "nm_select",
        "`nm_select` with packing, 8192 x 8192 bf16 and larger, every score",
        "device copy bandwidth on the bytes it must move",
        85,
        "%",
        share_of_copy,
    ),
    "fisher-diag-2048": Figure(
        "fisher_diag",
        "`fisher_diag_`, T = 2048",
        "cuBLAS GEMM + square + add",
        1.3,
        "x",
        ratio_to("cuBLAS + square + add"),
    ),
    "fisher-diag-256": Figure(
        "fisher_diag",
        "`fisher_diag_`, T = 256",
        "cuBLAS GEMM + square + add",
        4,
        "x",
        ratio_to("cuBLAS + square + add"),
    ),
    "fisher-diag-rate": Figure(
        "fisher_diag", "`fisher_diag_`", "cuBLAS bf16 rate on the same FLOPs", 65, "%", share_of_dense
    ),
    "fisher-trace-memory": Figure(
        "fisher_trace",
        "Fisher trace of a Llama-2-7B shape, 32 x 2048 tokens",
        "memory of the plain backward pass, more",
        2,
        "GB",
        largest("more_gb"),
        at_most=True,
    ),
    "fisher-trace-time": Figure(
        "fisher_trace",
        "Fisher trace of a Llama-2-7B shape, 32 x 2048 tokens",
        "time of the plain backward pass",
        1.25,
        "x",
        largest("time"),
        at_most=True,
    ),
    "obs-prune": Figure(
        "obs_prune", "`obs_prune` 4096 x 4096", "published torch loop, same GPU", 50, "x", ratio_to("torch loop")
    ),
    "spmm-dense": Figure(
        "nm_spmm",
        "2:4 GEMM, tokens >= 2048, geomean of 16 shapes",
        "cuBLASLt bf16, best algorithm",
        1.5,
        "x",
        # torch's choice is one of cuBLASLt's too: a worse choice by the search must not improve the ratio
        ratio_to_fastest("cuBLASLt best", "cuBLASLt"),
    ),
    "spmm-dense-torch": Figure(
        "nm_spmm",
        "2:4 GEMM, tokens >= 2048, geomean of 16 shapes",
        "cuBLAS and cuBLASLt bf16 as torch calls them, the faster",
        1.5,
        "x",
        ratio_to_fastest("cuBLAS", "cuBLASLt"),
    ),
    "spmm-cusparselt": Figure(
        "nm_spmm",
        "2:4 GEMM, tokens 64-8192, geomean",
        "cuSPARSELt, best algorithm",
        1.1,
        "x",
        ratio_to("cuSPARSELt", geomean),
    ),
    "spmm-cusparselt-worst": Figure(
        "nm_spmm", "2:4 GEMM, tokens 64-8192, worst", "cuSPARSELt, best algorithm", 0.9, "x", ratio_to("cuSPARSELt")
    ),
    "linear-2:8": Figure(
        "nm_linear",
        "`nm_linear` 2:8, 1 token, 14336 x 4096 and larger",
        "cuBLAS bf16",
        2.8,
        "x",
        ratio_to("cuBLAS"),
    ),
    "linear-half": Figure(
        "nm_linear",
        "`nm_linear` 2:4 and 4:8, 1 token, 14336 x 4096 and larger",
        "cuBLAS bf16",
        1.6,
        "x",
        ratio_to("cuBLAS"),
    ),
    "linear-bandwidth": Figure(
        "nm_linear",
        "`nm_linear`, 1 token, every N:8",
        "HBM bandwidth (measured copy) on packed bytes",
        80,
        "%",
        share_of_copy,
    ),
    "linear-16-tokens": Figure("nm_linear", "`nm_linear` 2:8, 16 tokens", "cuBLAS bf16", 2.2, "x", ratio_to("cuBLAS")),
    "linear-many-tokens": Figure(
        "nm_linear",
        "`nm_linear` after `fast_prefill`, 2:8 and 5:8, 65-2048 tokens, worst",
        "cuBLAS bf16",
        0.95,
        "x",
        ratio_to("cuBLAS"),
    ),
    "decode-speed": Figure(
        "decode",
        "decode, Llama-2-7B shape, mixed 75 %, batch 1, tokens/s",
        "dense bf16, both with CUDA graphs",
        2.3,
        "x",
        ratio_to("dense"),
    ),
    "decode-memory": Figure(
        "decode",
        "decode, Llama-2-7B shape, mixed 75 %, batch 1, memory",
        "dense bf16",
        0.4,
        "x",
        largest("memory"),
        at_most=True,
    ),
}
