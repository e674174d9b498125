"""The dense product by the fastest of cuBLASLt's algorithms, for which torch has no public interface.

torch takes the algorithm that cuBLASLt's heuristics put first. ``best`` requests up to ``MOST_ALGORITHMS`` of them,
runs and times each, and keeps the fastest::
and times each, and keeps the fastest::

    call = best([(x, weight), ...])
    y = call(turn)
    call.tried  # algorithms that ran

This is a binding by ctypes of the functions needed. Numbers and structures are those of ``cublasLt.h``,
``cublas_api.h`` and ``library_types.h`` in CUDA 12 and 13; https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
describes them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import weakref
from collections.abc import Callable, Sequence
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p, sizeof
from typing import Any

import torch
from torch import Tensor

from gpu.timing import SLEEP_CYCLES

SUCCESS = 0
COMPUTE_32F = 68
R_32F = 0
DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
OP_T = 1
MATMUL_DESC_TRANSA = 3
MATMUL_PREF_MAX_WORKSPACE_BYTES = 1

ARGUMENTS = {
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    # handle, operation, A, B, C, D, preference, asked for, results, found
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, c_void_p, c_void_p),
    # handle, operation, alpha, A and its layout, B, beta, C, D, algorithm, workspace and its bytes, stream
    "cublasLtMatmul": (*[c_void_p] * 14, c_size_t, c_void_p),
}

MOST_ALGORITHMS = 64
# NVIDIA's recommendation for Hopper, and torch's own setting for cuBLAS there
WORKSPACE_BYTES = 32 << 20
# Every algorithm is timed once, the fastest ones this many times more: at most 2 x 64 + 6 x 5 calls a shape. An average
# shape of bench_nm_spmm (43 M weights) takes 0.7 TFLOP for 8192 tokens, so 0.16 s at 700 TFLOP/s.
FINALISTS, ROUNDS = 6, 5


class Algorithm(ctypes.Structure):
    """``cublasLtMatmulAlgo_t``."""

    _fields_ = (("data", c_uint64 * 8),)


class Candidate(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The libcublasLt that torch has loaded: no other library may use torch's handle.

    Raises:
        OSError: torch has loaded none.
    """
    found = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}", os.RTLD_NOLOAD | os.RTLD_NOW)
    for name, arguments in ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    return found


def ask(name: str, *arguments: Any) -> None:
    """Call one of cuBLASLt's functions.

    Raises:
        RuntimeError: its status is not success.
    """
    if status := getattr(library(), name)(*arguments):
        raise RuntimeError(f"{name} gives status {status}")


class Product:
    """``y[T, R] = x[T, K] W[R, K]^T``: a call whose turn selects one of the pairs of ``x`` and ``W``, all of one shape.

    cuBLASLt's matrices are column-major, so each of these is transposed for it: ``Y[R, T] = A^T B`` with the weight as
    ``A[K, R]`` and x as ``B[K, T]``. torch does the same.

    Attributes:
        algorithm: the algorithm of a call.
        tried: the number of algorithms that ran before the choice.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        x, weight = pairs[0]
        needed = [(list(shape), x.dtype, True) for shape in (x.shape, (weight.shape[0], x.shape[1]))]
        for pair in pairs:
            found = [(list(each.shape), each.dtype, each.is_contiguous()) for each in pair]
            if found != needed:
                raise ValueError(f"shape, dtype and contiguity of x and weight are {found}, but must be {needed}")
        (tokens, columns), rows = x.shape, weight.shape[0]
        data_type = DATA_TYPES[x.dtype]
        self.pairs = pairs
        # a cublasHandle_t is a cublasLtHandle_t too; torch keeps it and destroys it
        self.handle = torch.cuda.current_blas_handle()
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)
        self.operation = self._create("cublasLtMatmulDesc", COMPUTE_32F, R_32F)
        self._set("cublasLtMatmulDesc", self.operation, MATMUL_DESC_TRANSA, c_int32(OP_T))
        self.weight = self._create("cublasLtMatrixLayout", data_type, columns, rows, columns)
        self.x = self._create("cublasLtMatrixLayout", data_type, columns, tokens, columns)
        self.y = self._create("cublasLtMatrixLayout", data_type, rows, tokens, rows)
        self.algorithm: Algorithm | None = None
        self.tried = 0

    def _create(self, kind: str, *arguments: int) -> c_void_p:
        """A descriptor that is destroyed with this object."""
        made = c_void_p()
        ask(f"{kind}Create", byref(made), *arguments)
        weakref.finalize(self, ask, f"{kind}Destroy", made)
        return made

    @staticmethod
    def _set(kind: str, descriptor: c_void_p, attribute: int, value: c_int32 | c_uint64) -> None:
        ask(f"{kind}SetAttribute", descriptor, attribute, byref(value), sizeof(value))

    def algorithms(self) -> list[Algorithm]:
        """The algorithms that cuBLASLt's heuristics name, the one with the shortest estimate first.

        They assume matrices aligned to 256 bytes; torch's allocator aligns to 512.
        """
        preference = self._create("cublasLtMatmulPreference")
        most = c_uint64(WORKSPACE_BYTES)
        self._set("cublasLtMatmulPreference", preference, MATMUL_PREF_MAX_WORKSPACE_BYTES, most)
        found, count = (Candidate * MOST_ALGORITHMS)(), c_int()
        matrices = (self.weight, self.x, self.y, self.y)
        ask(
            "cublasLtMatmulAlgoGetHeuristic",
            *(self.handle, self.operation, *matrices, preference),
            *(MOST_ALGORITHMS, byref(found), byref(count)),
        )
        return [one.algorithm for one in found[: count.value] if one.state == SUCCESS]

    def run(self, algorithm: Algorithm, turn: int) -> Tensor:
        x, weight = self.pairs[turn % len(self.pairs)]
        stream = torch.cuda.current_stream(x.device).cuda_stream
        y = x.new_empty(x.shape[0], weight.shape[0])
        ask(
            "cublasLtMatmul",
            *(self.handle, self.operation),
            *(byref(c_float(1.0)), weight.data_ptr(), self.weight, x.data_ptr(), self.x),
            *(byref(c_float(0.0)), y.data_ptr(), self.y, y.data_ptr(), self.y),
            *(byref(algorithm), self.workspace.data_ptr(), WORKSPACE_BYTES, stream),
        )
        return y

    def runs(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm runs; the first call also loads the kernel into the driver."""
        try:
            self.run(algorithm, 0)
        except RuntimeError:
            return False
        return True

    def __call__(self, turn: int) -> Tensor:
        assert self.algorithm is not None
        return self.run(self.algorithm, turn)


def fastest_first(
    run: Callable[[Algorithm, int], object], algorithms: Sequence[Algorithm], rounds: int
) -> list[Algorithm]:
    """The fastest by the median of some rounds, in each of which all take their turn with the same inputs."""
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    events = [[(event(), event()) for _ in range(rounds)] for _ in algorithms]
    for turn in range(rounds):
        for algorithm, timed in zip(algorithms, events, strict=True):
            # the GPU waits until the CPU has launched all timed calls
            torch.cuda._sleep(SLEEP_CYCLES)
            timed[turn][0].record()
            run(algorithm, turn)
            timed[turn][1].record()
    torch.cuda.synchronize()
    medians = [statistics.median(start.elapsed_time(end) for start, end in timed) for timed in events]
    return [algorithms[at] for at in sorted(range(len(algorithms)), key=medians.__getitem__)]


def best(pairs: Sequence[tuple[Tensor, Tensor]]) -> Product:
    """The product of some pairs of ``x [T, K]`` and ``weight [R, K]``, bf16 or fp16, summed in fp32.

    ``pairs`` together should be larger than the caches. The call can be captured in a CUDA graph, uses the current
    stream and allocates nothing but its result.

    Raises:
        OSError: torch has loaded no cuBLASLt.
        RuntimeError: cuBLASLt refuses, or none of its algorithms runs.
        ValueError: the pairs differ in shape or dtype, or are not contiguous.
    """
    product = Product(pairs)
    running = [algorithm for algorithm in product.algorithms() if product.runs(algorithm)]
    if not running:
        raise RuntimeError("no algorithm of cuBLASLt runs")
    finalists = fastest_first(product.run, running, 1)[:FINALISTS]
    product.algorithm, product.tried = fastest_first(product.run, finalists, ROUNDS)[0], len(running)
    return product
