"""The CUDA kernel's index arithmetic and selection, compiled for the CPU and run thread after thread."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from native_cases import BFLOAT16, DTYPES, FLOAT32, KINDS, SCALED, make_case

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("this machine has no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = TESTS / "native" / "nm_select_emulated.cpp"
    done = subprocess.run(
        [compiler, *flags, f"-I{TESTS.parent / 'csrc'}", str(source), "-o", str(library)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def run(emulated: ctypes.CDLL, case, *, offset: int = 0) -> tuple[int, np.ndarray, np.ndarray]:
    """Runs the emulated kernel on aligned copies shifted by ``offset`` elements; what it returned, values, bitmask."""

    def aligned(array, shift=0):
        memory = np.zeros(array.nbytes + 64 + shift * array.itemsize, np.uint8)
        start = -memory.ctypes.data % 16 + shift * array.itemsize
        view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    rows, columns = case.stored.shape
    weight = aligned(case.stored, offset)
    terms = [None if t is None else aligned(t) for t in case.terms]
    values = aligned(np.zeros(rows * (columns // case.group_size) * case.n + 16, case.stored.dtype), offset)
    bitmask = aligned(np.zeros(rows * -(-columns // 8) + 16, np.uint8))
    values[...], bitmask[...] = 77, 0xA5
    pointer = ctypes.c_void_p
    vectors = emulated.nm_select_emulated(
        pointer(weight.ctypes.data),
        case.dtype,
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        case.group_size,
        case.n,
        int(case.compliant),
        case.kind,
        *(pointer(None if term is None else term.ctypes.data) for term in terms),
        pointer(values.ctypes.data),
        pointer(bitmask.ctypes.data),
    )
    return vectors, values, bitmask


def check(emulated: ctypes.CDLL, case, *, offset: int = 0) -> int:
    """Holds what the emulated kernel made against the case's own choice; returns whether it used vectors."""
    columns = case.stored.shape[1]
    kept = case.kept()
    expected = case.stored[kept]
    mask = np.packbits(np.pad(kept, ((0, 0), (0, -columns % 8))), axis=1, bitorder="little")
    vectors, values, bitmask = run(emulated, case, offset=offset)
    assert vectors >= 0, "a thread wrote past the block's shared memory"
    np.testing.assert_array_equal(bitmask[: mask.size].reshape(mask.shape), mask)
    bits = np.dtype(f"u{case.stored.itemsize}")
    np.testing.assert_array_equal(values[: expected.size].view(bits), expected.ravel().view(bits))
    assert (values[expected.size :] == 77).all() and (bitmask[mask.size :] == 0xA5).all()
    return int(vectors)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_every_level(emulated: ctypes.CDLL, group_size: int, dtype: int, kind: int) -> None:
    rng = np.random.default_rng([group_size, dtype, kind])
    for n in range(group_size + 1):
        rows, groups = int(rng.integers(1, 7)), int(rng.integers(1, 40))
        ties, compliant = bool(rng.integers(2)), n <= group_size // 2 and bool(rng.integers(2))
        check(
            emulated,
            make_case(rng, rows, groups * group_size, group_size, n, dtype, kind, ties=ties, compliant=compliant),
        )


@pytest.mark.parametrize("columns", [4, 12, 20, 172, 1028])
def test_rows_that_end_inside_a_byte(emulated: ctypes.CDLL, columns: int) -> None:
    rng = np.random.default_rng(columns)
    for dtype in DTYPES.values():
        for n in (1, 2, 3):
            case = make_case(rng, 37, columns, 4, n, dtype, SCALED)
            assert check(emulated, case) == 0  # a unit that is cut cannot be read whole


@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_many_blocks(emulated: ctypes.CDLL, group_size: int) -> None:
    rng = np.random.default_rng(group_size)
    case = make_case(rng, 19, 32 * 31, group_size, group_size // 4, BFLOAT16, SCALED)
    assert check(emulated, case) == 1


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_unaligned_tensors(emulated: ctypes.CDLL, dtype: int) -> None:
    rng = np.random.default_rng(dtype)
    assert check(emulated, make_case(rng, 11, 8 * 41, 8, 3, dtype, SCALED), offset=1) == 0


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_says_when_a_weight_is_not_finite(emulated: ctypes.CDLL, kind: int, value: float) -> None:
    rng = np.random.default_rng([kind, 7])
    case = make_case(rng, 5, 8 * 9, 8, 2, FLOAT32, kind)
    case.stored.reshape(-1).view(np.float32)[rng.integers(case.stored.size)] = value
    assert run(emulated, case)[0] == -2
