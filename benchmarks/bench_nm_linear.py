"""``nm_linear`` on the CPU, compared with torch's dense linear and a dense GEMV written in the same style."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from runner import measure, native_peers

from msp.formats.patterns import NMPattern
from msp.ops import PackedWeight, force_backend, nm_linear, nm_select

ROWS = COLUMNS = 4096
# more bytes than the last cache of any likely machine keeps between two uses
ROTATED_BYTES = 768 << 20
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def dense(request: pytest.FixtureRequest) -> list[torch.Tensor]:
    """Enough weights that none is in a cache at its next turn."""
    size = ROWS * COLUMNS * request.param.itemsize
    return [torch.randn(ROWS, COLUMNS).to(request.param) for _ in range(ROTATED_BYTES // size)]


def rotate(packed: PackedWeight) -> Iterator[PackedWeight]:
    copies = [
        PackedWeight(packed.values.clone(), packed.bitmask.clone(), packed.pattern, packed.shape)
        for _ in range(ROTATED_BYTES // packed.nbytes)
    ]
    for copy in copies:  # as loading a model does, once
        copy.check_once()
    return itertools.cycle(copies)


def compare(benchmark, dense: list[torch.Tensor], pattern: str, tokens: int, *, gemv: bool = True) -> None:
    dtype = dense[0].dtype
    packed = nm_select(dense[0], NMPattern.parse(pattern))
    x = torch.randn(tokens, COLUMNS).to(dtype)
    want = x.double() @ packed.unpack().double().T
    with force_backend("cpu"):
        error = float((nm_linear(x, packed).double() - want).norm() / want.norm())
    theirs = float((torch.nn.functional.linear(x, packed.unpack()).double() - want).norm() / want.norm())
    copies, weights = rotate(packed), itertools.cycle(dense)
    peers = {"torch dense": lambda: torch.nn.functional.linear(x, next(weights))}
    library = native_peers()
    if gemv and tokens == 1 and dtype == torch.bfloat16 and library.has_dense_gemv():
        y = torch.empty(ROWS)

        def dense_gemv() -> None:
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, next(weights), y))
            sizes = (ctypes.c_int64(ROWS), ctypes.c_int64(COLUMNS))
            library.dense_gemv(*pointers, *sizes, torch.get_num_threads())

        dense_gemv()
        peers["dense GEMV"] = dense_gemv
    moved = packed.nbytes + x.nbytes + tokens * ROWS * dtype.itemsize
    with force_backend("cpu"), torch.inference_mode():
        measure(
            benchmark,
            lambda: nm_linear(x, next(copies)),
            peers,
            error=error,
            bound=min(BOUND[dtype], max(2 * theirs, 1e-7)),
            moved=moved,
            flops=2 * tokens * ROWS * COLUMNS * packed.pattern.n // packed.pattern.m,
        )


@pytest.mark.parametrize("pattern", ["1:8", "2:8", "3:8", "4:8", "2:4", "1:16", "2:16", "8:32"])
def test_one_token(benchmark, dense, pattern: str) -> None:
    compare(benchmark, dense, pattern, 1)


@pytest.mark.parametrize("tokens", [2, 4, 8, 16, 17, 32, 48, 64, 65, 128, 256, 512, 1024])
def test_tokens_2_8(benchmark, dense, tokens: int) -> None:
    compare(benchmark, dense, "2:8", tokens)


@pytest.mark.parametrize("tokens", [17, 64, 128, 512, 1024])
@pytest.mark.parametrize("pattern", ["4:8", "2:4"])
def test_tokens(benchmark, dense, pattern: str, tokens: int) -> None:
    compare(benchmark, dense, pattern, tokens)


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "scalar"])
def test_isa_one_token_2_8(benchmark, dense, isa: str) -> None:
    before = os.environ.get("MSP_ISA")
    os.environ["MSP_ISA"] = isa
    try:
        compare(benchmark, dense, "2:8", 1, gemv=False)
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        if before is None:
            del os.environ["MSP_ISA"]
        else:
            os.environ["MSP_ISA"] = before
