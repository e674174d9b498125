"""``nm_spmm``, the kernel of ``nm_linear`` on 2:4 sparse tensor cores, against the dense product and cuSPARSELt's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu import cublaslt
from gpu.runner import Call, Context, Measured, Missing, Planned, Rotation, relative_error
from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, nm_linear, nm_select
from msp.ops.linear import FRAGMENTS

# [out, in] of Llama-2-7B (with q/k/v and gate/up in one as well), Llama-3-8B, Qwen2.5-7B and Qwen2.5-14B
SHAPES = [
    (4096, 4096),
    (12288, 4096),
    (11008, 4096),
    (22016, 4096),
    (4096, 11008),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (3584, 3584),
    (512, 3584),
    (18944, 3584),
    (3584, 18944),
    (5120, 5120),
    (1024, 5120),
    (13824, 5120),
    (5120, 13824),
]
# the tokens of the figures first, in case time runs out
TOKENS = [2048, 64, 512, 8192, 128, 1024]
BOUND = 1e-2

Peer = TypeVar("Peer", bound=Call)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    dense: Tensor
    packed: PackedWeight


def make(context: Context, pattern: str, rows: int, columns: int, tokens: int) -> Inputs:
    packed = nm_select(context.randn(rows, columns), NMPattern.parse(pattern), compliant=True)
    return Inputs(context.randn(tokens, columns), packed.unpack(), packed)


def cusparselt(inputs: Rotation[Inputs]) -> Call:
    """The product by the algorithm, and the split of K, that cuSPARSELt's own search finds fastest for the shape."""
    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("this torch has no cuSPARSELt")
    compressed = [torch._cslt_compress(one.dense) for one in inputs.items]
    tokens = [one.x.t() for one in inputs.items]
    # compressed, dense, bias, alpha, out_dtype, transpose_result; the largest algorithm's number comes last
    found = torch._C._cusparselt.mm_search(compressed[0], tokens[0], None, None, None, True)
    options = dict(zip(("alg_id", "split_k", "split_k_mode"), found, strict=False))

    def call(turn: int) -> Tensor:
        at = turn % len(tokens)
        return torch._cslt_sparse_mm(compressed[at], tokens[at], transpose_result=True, **options)

    return call


def cublaslt_best(inputs: Rotation[Inputs]) -> cublaslt.Product:
    """The dense product by the fastest algorithm that cuBLASLt's heuristics name for the shape."""
    return cublaslt.best([(one.x, one.dense) for one in inputs.items])


def checked(peer: Callable[[Rotation[Inputs]], Peer], inputs: Rotation[Inputs]) -> Peer | Missing:
    """A peer's product, if it is right; one that does not serve must not cost our own rows."""
    try:
        call = peer(inputs)
        error = relative_error(call(0), F.linear(inputs[0].x, inputs[0].dense))
    except Exception as problem:
        return Missing(f"{type(problem).__name__}: {problem}".split("\n")[0])
    return call if error <= BOUND else Missing(f"its product is off by {error:.2g}")


def dense(context: Context, inputs: Rotation[Inputs], library: str) -> Call:
    """torch's product by one of NVIDIA's libraries, which takes what its own heuristics choose."""

    def call(turn: int) -> Tensor:
        if not context.dry:
            torch.backends.cuda.preferred_blas_library(library)
        return F.linear(inputs[turn].x, inputs[turn].dense)

    return call


def kept_in_order(context: Context, inputs: Rotation[Inputs]) -> Call:
    """Our product with weights that were brought into fragment order before, as prefill of a long prompt has them."""
    if context.dry:
        return packed_each_time(context, inputs)
    arranged = [arrange(one.packed) for one in inputs.items]
    return lambda turn: multiply(inputs[turn], arranged[turn % len(arranged)])


def arrange(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    return FRAGMENTS.arrange(packed.values, packed.bitmask, packed.pattern, packed.shape[1])


def multiply(one: Inputs, arranged: tuple[Tensor, Tensor]) -> Tensor:
    return FRAGMENTS.product(one.x, *arranged, None, one.packed.pattern, one.packed.shape[1])


def packed_each_time(context: Context, inputs: Rotation[Inputs]) -> Call:
    def call(turn: int) -> Tensor:
        one = inputs[turn]
        if context.dry:  # nothing here can arrange it
            return nm_linear(one.x, one.packed)
        return multiply(one, arrange(one.packed))

    return call


def measured(context: Context, pattern: str, kept: bool, rows: int, columns: int, tokens: int) -> Measured:
    moved = 2 * tokens * (rows + columns) + rows * columns * 9 // 8
    inputs = context.rotate(lambda: make(context, pattern, rows, columns, tokens), moved)
    ours = kept_in_order(context, inputs) if kept else packed_each_time(context, inputs)
    libraries = ("cuBLAS", "cuBLASLt")
    peers: dict[str, Call | Missing] = {name: dense(context, inputs, name.lower()) for name in libraries}
    extra: dict[str, float] = {}
    if kept:
        peers["cuSPARSELt"] = checked(cusparselt, inputs)
    # the search takes long, so only for rows of a figure
    if "spmm-dense" in figures(kept, tokens):
        peers["cuBLASLt best"] = searched = checked(cublaslt_best, inputs)
        if not isinstance(searched, Missing):
            extra["cublaslt_algorithms"] = searched.tried
    first = inputs[0]
    return context.measure(
        ours,
        peers,
        error=relative_error(ours(0), first.x.float() @ first.dense.float().t()),
        bound=BOUND,
        moved=moved,
        flops=2 * tokens * rows * columns,
        turns=len(inputs),
        extra=extra,
    )


def figures(kept: bool, tokens: int) -> tuple[str, ...]:
    """The figures that a row counts for."""
    dense = ("spmm-dense", "spmm-dense-torch") if tokens >= 2048 else ()
    return ("spmm-cusparselt", "spmm-cusparselt-worst", *dense) if kept else ()


def rows(context: Context) -> Iterator[Planned]:
    # the reference of the sum must not be rounded to tf32
    torch.backends.cuda.matmul.allow_tf32 = False

    def measure(*case: Any) -> Measured:
        with context.backend("cuda"):
            return measured(context, *case)

    wide = context.sizes(SHAPES, small=[(48, 64)])
    some = context.sizes([(4096, 4096), (14336, 4096)], small=[(24, 64)])
    for tokens in context.sizes(TOKENS, small=[3, 70]):
        for pattern, kept, shapes in (("2:4", True, wide), ("2:8", False, some), ("4:8", False, some)):
            name = f"nm_spmm {pattern} bf16{'' if kept else ', packed each time'}"
            for rows, columns in shapes:
                now = functools.partial(measure, pattern, kept, rows, columns, tokens)
                yield Planned(name, f"{tokens}x{rows}x{columns}", now, figures(kept, tokens))
