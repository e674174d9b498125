"""The C++ kernels against a selection written in numpy, called by address as the dispatch calls them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

native = pytest.importorskip("msp._cpu", reason="the compiled module msp._cpu is not built")

FLOAT32, FLOAT16, BFLOAT16 = range(3)
MAGNITUDE, SCALED, RELATIVE, FISHER, GIVEN = range(5)
DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
KINDS = {"magnitude": MAGNITUDE, "scaled": SCALED, "relative": RELATIVE, "fisher": FISHER, "given": GIVEN}
ISAS = ("scalar", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MSP_ISA", request.param)
    try:
        assert native.isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    return str(request.param)


@dataclass
class Case:
    """The arguments of one call, and what must come out."""

    stored: NDArray[np.generic]
    dtype: int
    group_size: int
    n: int
    compliant: bool
    kind: int
    column_scale: NDArray[np.float32] | None = None
    row_term: NDArray[np.float32] | None = None
    column_term: NDArray[np.float32] | None = None
    matrix: NDArray[np.float32] | None = None

    @property
    def weight(self) -> NDArray[np.float32]:
        if self.dtype == BFLOAT16:
            return (self.stored.astype(np.uint32) << 16).view(np.float32)
        return self.stored.astype(np.float32)

    def scores(self) -> NDArray[np.float32]:
        w = self.weight
        if self.kind == GIVEN:
            assert self.matrix is not None
            return self.matrix
        if self.kind == FISHER:
            assert self.matrix is not None
            return (w * w) * self.matrix
        score = np.abs(w)
        if self.kind == RELATIVE:
            assert self.row_term is not None and self.column_term is not None
            score = score * (self.row_term[:, None] + self.column_term)
        return score if self.column_scale is None else score * self.column_scale

    def kept(self) -> NDArray[np.bool_]:
        """The greedy walk in rank order, group by group, as DESIGN words it."""
        rows, columns = self.stored.shape
        scores = self.scores().reshape(-1, self.group_size)
        kept = np.zeros(scores.shape, bool)
        # stable: of equals, the lower column comes first
        for group, order in enumerate(np.argsort(-scores, axis=1, kind="stable")):
            quads = [0] * (self.group_size // 4)
            taken = 0
            for column in order:
                if taken < self.n and (not self.compliant or quads[column // 4] < 2):
                    kept[group, column] = True
                    quads[column // 4] += 1
                    taken += 1
        return kept.reshape(rows, columns)

    def run(self, threads: int = 1) -> tuple[NDArray[np.generic], NDArray[np.uint8], int]:
        """Values, bitmask and the count returned; both outputs are poisoned, with a canary behind them."""
        rows, columns = self.stored.shape
        kept_per_row, mask_bytes = columns // self.group_size * self.n, (columns + 7) // 8
        values = np.full(rows * kept_per_row + 64, 77, self.stored.dtype)
        bitmask = np.full(rows * mask_bytes + 64, 0xA5, np.uint8)
        terms = (self.column_scale, self.row_term, self.column_term, self.matrix)
        wrong = native.nm_select(
            self.stored.ctypes.data,
            self.dtype,
            rows,
            columns,
            self.group_size,
            self.n,
            self.compliant,
            self.kind,
            *(0 if term is None else term.ctypes.data for term in terms),
            values.ctypes.data,
            bitmask.ctypes.data,
            threads,
        )
        assert (values[rows * kept_per_row :] == 77).all(), "wrote past the end of the values"
        assert (bitmask[rows * mask_bytes :] == 0xA5).all(), "wrote past the end of the bitmask"
        return (
            values[: rows * kept_per_row].reshape(rows, kept_per_row),
            bitmask[: rows * mask_bytes].reshape(rows, mask_bytes),
            wrong,
        )

    def ranks(self) -> NDArray[np.uint8]:
        """How many of its group come before each in a stable sort."""
        scores = self.scores().reshape(-1, self.group_size)
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.argsort(order, axis=1).astype(np.uint8).reshape(self.stored.shape)

    def run_rank(self, threads: int = 1) -> tuple[NDArray[np.uint8], int]:
        """Ranks, poisoned before and with a canary behind them, and the count returned."""
        rows, columns = self.stored.shape
        rank = np.full(rows * columns + 64, 0xA5, np.uint8)
        terms = (self.column_scale, self.row_term, self.column_term, self.matrix)
        wrong = native.nm_rank(
            self.stored.ctypes.data,
            self.dtype,
            rows,
            columns,
            self.group_size,
            self.kind,
            *(0 if term is None else term.ctypes.data for term in terms),
            rank.ctypes.data,
            threads,
        )
        assert (rank[rows * columns :] == 0xA5).all(), "wrote past the end of the ranks"
        return rank[: rows * columns].reshape(rows, columns), wrong

    def check_rank(self, threads: int = 1) -> None:
        rank, wrong = self.run_rank(threads)
        np.testing.assert_array_equal(rank, self.ranks())
        assert wrong == 0

    def run_keep(self, rank: NDArray[np.uint8], n: int, threads: int = 1) -> NDArray[np.generic]:
        out = np.full(self.stored.size + 64, 77, self.stored.dtype)
        native.nm_keep(
            self.stored.ctypes.data, rank.ctypes.data, out.ctypes.data, self.dtype, self.stored.size, n, threads
        )
        assert (out[self.stored.size :] == 77).all(), "wrote past the end of the output"
        return out[: self.stored.size].reshape(self.stored.shape)

    def check(self, threads: int = 1) -> None:
        values, bitmask, wrong = self.run(threads)
        kept = self.kept()
        padded = np.pad(kept, ((0, 0), (0, -kept.shape[1] % 8)))
        np.testing.assert_array_equal(bitmask, np.packbits(padded, axis=1, bitorder="little"))
        bits = np.dtype(f"u{self.stored.itemsize}")
        np.testing.assert_array_equal(values.view(bits).ravel(), self.stored[kept].view(bits))
        assert wrong == 0


def make_case(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    group_size: int,
    n: int,
    dtype: int = BFLOAT16,
    kind: int = MAGNITUDE,
    *,
    compliant: bool = False,
    ties: bool = False,
    scale: float = 1.0,
) -> Case:
    """Random weights over many magnitudes, with zeros of both signs; ``ties``: few distinct values."""

    def draw(*shape: int) -> NDArray[np.float32]:
        if ties:
            return rng.integers(-2, 3, shape).astype(np.float32)
        return (rng.standard_normal(shape) * np.exp2(rng.integers(-8, 3, shape))).astype(np.float32)

    weight = draw(rows, columns) * np.float32(scale)
    weight[rng.random(weight.shape) < 0.1] = 0.0
    weight[rng.random(weight.shape) < 0.1] = -0.0
    stored: NDArray[np.generic]
    if dtype == BFLOAT16:
        stored = (weight.view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = weight.astype(np.float16 if dtype == FLOAT16 else np.float32)
    case = Case(stored, dtype, group_size, n, compliant, kind)
    if kind in (SCALED, RELATIVE):
        case.column_scale = draw(columns)
    if kind == RELATIVE:
        case.row_term, case.column_term = draw(rows), draw(columns)
    if kind in (FISHER, GIVEN):
        case.matrix = draw(rows, columns)
    return case


@pytest.mark.parametrize("ties", [False, True], ids=["spread", "ties"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_every_level(isa: str, group_size: int, dtype: int, kind: int, ties: bool) -> None:
    rng = np.random.default_rng([group_size, dtype, kind, ties])
    for n in range(group_size + 1):
        columns = group_size * int(rng.integers(1, 12))
        make_case(rng, int(rng.integers(1, 6)), columns, group_size, n, dtype, kind, ties=ties).check()


@pytest.mark.parametrize("ties", [False, True], ids=["spread", "ties"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_compliant(isa: str, group_size: int, dtype: int, kind: int, ties: bool) -> None:
    rng = np.random.default_rng([1, group_size, dtype, kind, ties])
    for n in range(group_size // 2 + 1):
        case = make_case(rng, 3, group_size * 7, group_size, n, dtype, kind, compliant=True, ties=ties)
        case.check()


@pytest.mark.parametrize("columns", [4, 8, 12, 16, 20, 28, 36, 44, 60, 172])
def test_rows_that_end_inside_a_vector(isa: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    for dtype in DTYPES.values():
        for group_size in (m for m in (4, 8, 16, 32) if columns % m == 0):
            make_case(rng, 5, columns, group_size, group_size // 2, dtype, SCALED).check()


@pytest.mark.parametrize("ties", [False, True], ids=["spread", "ties"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_ranks(isa: str, group_size: int, dtype: int, kind: int, ties: bool) -> None:
    # one group; fewer, as many and more than the 16 that AVX-512 ranks at once
    rng = np.random.default_rng([2, group_size, dtype, kind, ties])
    for groups in (1, 2, 3, 7, 15, 16, 17, 37):
        rows = int(rng.integers(1, 4))
        make_case(rng, rows, group_size * groups, group_size, 1, dtype, kind, ties=ties).check_rank()


@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_ranks_and_selection_agree_on_every_level(isa: str, group_size: int) -> None:
    rng = np.random.default_rng(group_size)
    case = make_case(rng, 5, group_size * 19, group_size, 0, BFLOAT16, RELATIVE, ties=True)
    rank, _ = case.run_rank()
    for n in range(group_size + 1):
        case.n = n
        kept = np.pad(rank < n, ((0, 0), (0, -rank.shape[1] % 8)))
        np.testing.assert_array_equal(case.run()[1], np.packbits(kept, axis=1, bitorder="little"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("columns", [1, 3, 31, 32, 33, 63, 64, 65, 127, 200, 70000])
def test_keeps_up_to_a_rank(isa: str, dtype: int, columns: int) -> None:
    rng = np.random.default_rng([columns, dtype])
    case = make_case(rng, 1, columns, 4, 0, dtype)
    rank = rng.integers(0, 256, (1, columns)).astype(np.uint8)
    for n in (0, 1, 2, 31, 32, 128, 255, 256, 1000):
        out = case.run_keep(rank, n, threads=2)
        # as bits: a zero put in has no sign, one that is kept may have
        bits = np.dtype(f"u{out.itemsize}")
        np.testing.assert_array_equal(out.view(bits), np.where(rank < n, case.stored.view(bits), 0))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_subnormal_weights_are_ranked(isa: str, dtype: int) -> None:
    scale = {FLOAT32: 2.0**-140, FLOAT16: 2.0**-18, BFLOAT16: 2.0**-128}[dtype]
    case = make_case(np.random.default_rng(5), 9, 96, 8, 3, dtype, scale=scale)
    assert np.count_nonzero(case.weight) > 100
    case.check()
    case.check_rank()


def test_relative_without_a_column_scale(isa: str) -> None:
    case = make_case(np.random.default_rng(6), 7, 72, 8, 3, BFLOAT16, RELATIVE)
    case.column_scale = None
    case.check()
    case.check_rank()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_share_the_rows(isa: str, threads: int) -> None:
    rng = np.random.default_rng(threads)
    for group_size in (4, 8, 32):
        case = make_case(rng, 301, 32 * 31, group_size, 2, BFLOAT16, SCALED)
        values, bitmask, _ = case.run(1)
        for _ in range(3):
            threaded = case.run(threads)
            np.testing.assert_array_equal(values, threaded[0])
            np.testing.assert_array_equal(bitmask, threaded[1])
        rank, _ = case.run_rank()
        np.testing.assert_array_equal(rank, case.run_rank(threads)[0])
        np.testing.assert_array_equal(case.run_keep(rank, 2), case.run_keep(rank, 2, threads))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_counts_what_is_not_finite(isa: str, kind: int, bad: float) -> None:
    rng = np.random.default_rng(kind)
    for dtype, columns in ((FLOAT32, 44), (FLOAT16, 44), (FLOAT32, 64)):
        group_size = 4 if columns == 44 else 32
        case = make_case(rng, 6, columns, group_size, 1, dtype, kind)
        places = rng.choice(case.stored.size, 5, replace=False)
        case.stored.reshape(-1)[places] = bad
        if case.column_scale is not None:
            case.column_scale[case.column_scale == 0] = 1  # inf * 0 is NaN, so also counted, but only once
        assert case.run()[2] == 5
        assert case.run_rank()[1] == 5
    if kind == GIVEN:
        case = make_case(rng, 6, 64, 8, 1, FLOAT32, kind)
        assert case.matrix is not None
        case.matrix[2, 7] = bad
        assert case.run()[2] == 1
        assert case.run_rank()[1] == 1


def test_empty_shapes() -> None:
    rng = np.random.default_rng(0)
    for rows, columns in ((0, 16), (3, 0)):
        values, bitmask, wrong = make_case(rng, rows, columns, 8, 2).run()
        assert values.size == 0 and bitmask.size == 0 and wrong == 0
        case = make_case(rng, rows, columns, 8, 2)
        rank, wrong = case.run_rank()
        assert rank.size == 0 and wrong == 0
        assert case.run_keep(rank, 2).size == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 3}, "dtype_code 3 is not one of"),
        ({"group_size": 6}, "group_size 6 is not one of 4, 8, 16, 32"),
        ({"group_size": 32}, "48 columns are not a multiple of group_size 32"),
        ({"n": 9}, "n 9 is outside 0 ... 8"),
        ({"n": -1}, "n -1 is outside 0 ... 8"),
        ({"n": 5, "compliant": True}, "n 5 is outside 0 ... 4"),
        ({"kind": 5}, "score_kind 5 is not one of"),
        ({"kind": SCALED}, "column_scale_ptr is null"),
        ({"kind": RELATIVE}, "row_term_ptr is null"),
        ({"kind": GIVEN}, "matrix_ptr is null"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, int], message: str) -> None:
    case = make_case(np.random.default_rng(0), 2, 48, 8, 2)
    for name, value in change.items():
        setattr(case, name, value)
    rows, columns = case.stored.shape
    values, bitmask = np.zeros(4096, np.uint32), np.zeros(4096, np.uint8)
    with pytest.raises(ValueError, match=message):
        native.nm_select(
            case.stored.ctypes.data, case.dtype, rows, columns, case.group_size, case.n, case.compliant, case.kind,
            0, 0, 0, 0, values.ctypes.data, bitmask.ctypes.data, 1,
        )  # fmt: skip


def test_misaligned_address_is_refused() -> None:
    case = make_case(np.random.default_rng(0), 2, 48, 8, 2)
    with pytest.raises(ValueError, match="weight_ptr is not a multiple of 2"):
        native.nm_select(case.stored.ctypes.data + 1, case.dtype, 2, 48, 8, 2, False, 0, 0, 0, 0, 0, 64, 64, 1)


@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_obs_prune(isa: str, group_size: int) -> None:
    """Its own tests are those of the op; this one runs in the sanitized module too."""
    rng = np.random.default_rng(group_size)
    for rows, columns in ((1, 1), (17, 5), (101, 9)):
        columns *= group_size
        factor = np.triu(rng.standard_normal((columns, columns)) / columns, 1).astype(np.float32)
        np.fill_diagonal(factor, rng.uniform(0.5, 1.5, columns))
        factor[np.tril_indices(columns, -1)] = np.nan
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        updated, kept = np.full_like(weight, np.nan), np.full(weight.shape, 77, np.uint8)
        pointers = (array.ctypes.data for array in (weight, factor, updated, kept))
        native.obs_prune(*pointers, rows, columns, group_size, group_size // 2, 3)
        assert (kept.reshape(rows, -1, group_size).sum(-1) == group_size // 2).all() and kept.max() == 1
        want = weight.astype(np.float64)
        for i in range(columns):
            error = np.where(kept[:, i], 0.0, want[:, i]) / factor[i, i]
            want[:, i] *= kept[:, i]
            want[:, i + 1 :] -= np.outer(error, factor[i, i + 1 :])
        np.testing.assert_allclose(updated, want, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_of_rank_and_keep_are_named() -> None:
    case = make_case(np.random.default_rng(0), 2, 48, 8, 2)
    weight, rank = case.stored.ctypes.data, np.zeros((2, 48), np.uint8).ctypes.data
    with pytest.raises(ValueError, match="48 columns are not a multiple of group_size 32"):
        native.nm_rank(weight, BFLOAT16, 2, 48, 32, MAGNITUDE, 0, 0, 0, 0, rank, 1)
    with pytest.raises(ValueError, match="rank_ptr is null"):
        native.nm_rank(weight, BFLOAT16, 2, 48, 8, MAGNITUDE, 0, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="dtype_code 3 is not one of"):
        native.nm_keep(weight, rank, weight, 3, 96, 2, 1)
    with pytest.raises(ValueError, match="n -1 is negative"):
        native.nm_keep(weight, rank, weight, BFLOAT16, 96, -1, 1)
    with pytest.raises(ValueError, match="out_ptr is not a multiple of 2"):
        native.nm_keep(weight, rank, weight + 1, BFLOAT16, 96, 2, 1)


def test_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSP_ISA", "mmx")
    with pytest.raises(RuntimeError, match=r"MSP_ISA=mmx .*available: .*scalar"):
        native.isa()


def test_concurrent_callers() -> None:
    cases = [make_case(np.random.default_rng(seed), 257, 1024, 8, 2, BFLOAT16, SCALED) for seed in range(4)]
    expected = [case.run(1) for case in cases]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(20):
            values, bitmask, _ = cases[which].run(3)
            if not (np.array_equal(values, expected[which][0]) and np.array_equal(bitmask, expected[which][1])):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run_python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A crash in there is a failure here. Not in the current folder, whose ``msp`` would come before the installed."""
    code = code.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


FORKING = """
import os, sys
sys.path.insert(0, {tests!r})
if "torch" in sys.argv:
    import torch                            # brings the OpenMP runtime whose threads are used then
import numpy as np
from test_native import make_case
case = make_case(np.random.default_rng(0), 257, 1024, 8, 2)
expected = case.run(4)                      # the pool's threads exist in the parent
child = os.fork()
if child == 0:
    values, bitmask, _ = case.run(4)        # and not in the child
    os._exit(0 if np.array_equal(values, expected[0]) and np.array_equal(bitmask, expected[1]) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_threads_after_fork(tmp_path: Path, library: str) -> None:
    if library == "torch" and "build/sanitize" in native.__file__:
        pytest.skip("torch is not built for the sanitizers")
    done = run_python(FORKING, tmp_path, library)
    assert done.returncode == 0, done.stderr


# A page that faults lies right behind (or before) each buffer.
GUARDED = """
import ctypes, mmap, sys
sys.path.insert(0, {tests!r})
import numpy as np
from test_native import DTYPES, KINDS, make_case, native
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
held = []

def guarded(array, at_end):
    size = array.nbytes
    pages = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    held.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (base, base + mmap.PAGESIZE + pages):
        assert libc.mprotect(fence, mmap.PAGESIZE, 0) == 0
    start = base + mmap.PAGESIZE + (pages - size if at_end else 0)
    ctypes.memmove(start, array.ctypes.data, size)
    return start

rng = np.random.default_rng(int(sys.argv[1]))
for dtype in DTYPES.values():
    for kind in KINDS.values():
        for group_size in (4, 8, 16, 32):
            for columns in {{group_size, group_size * 3, group_size * 7}}:
                for at_end in (True, False):
                    case = make_case(rng, 3, columns, group_size, group_size // 2, dtype, kind)
                    expected = case.run()
                    terms = (case.column_scale, case.row_term, case.column_term, case.matrix)
                    values, bitmask = (guarded(np.zeros_like(out), at_end) for out in expected[:2])
                    native.nm_select(
                        guarded(case.stored, at_end), dtype, 3, columns, group_size, case.n, False, kind,
                        *(0 if term is None else guarded(term, at_end) for term in terms), values, bitmask, 1)
                    for address, out in zip((values, bitmask), expected):
                        assert ctypes.string_at(address, out.nbytes) == out.tobytes()
                    ranks = case.run_rank()[0]
                    rank, kept = guarded(np.zeros_like(ranks), at_end), guarded(np.zeros_like(case.stored), at_end)
                    weight = guarded(case.stored, at_end)
                    native.nm_rank(
                        weight, dtype, 3, columns, group_size, kind,
                        *(0 if term is None else guarded(term, at_end) for term in terms), rank, 1)
                    native.nm_keep(weight, rank, kept, dtype, case.stored.size, case.n, 1)
                    expected = ranks, case.run_keep(ranks, case.n)
                    for address, out in zip((rank, kept), expected):
                        assert ctypes.string_at(address, out.nbytes) == out.tobytes()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages the Linux way")
def test_touches_nothing_outside_its_buffers(isa: str, tmp_path: Path) -> None:
    done = run_python(GUARDED, tmp_path, "11")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
