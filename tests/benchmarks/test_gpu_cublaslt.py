"""The search for cuBLASLt's best algorithm, with one on the CPU that multiplies column-major and tells its times."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from ctypes import c_int32, c_uint64, c_void_p
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpu import bench_nm_spmm, cublaslt, runner
from gpu.runner import Context, Measured, Missing, Rotation

TOKENS, ROWS, COLUMNS = 6, 8, 16
HANDLE, STREAM = 0x7FFF_0123_4567_89AB, 0x7FFE_0000_0000_0010
INVALID_VALUE, NOT_SUPPORTED, EXECUTION_FAILED = 7, 15, 13
DTYPES = {number: dtype for dtype, number in cublaslt.DATA_TYPES.items()}


class FakeLibrary:
    """``algorithms`` are their times in microseconds, or None for one that fails when it runs.

    Functions are called through C, by the argument types of the binding. Descriptors that were created and not yet
    destroyed are in ``alive``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, algorithms: list[float | None]) -> None:
        self.algorithms, self.state = algorithms, [0] * len(algorithms)
        self.now, self.factor, self.status = 0.0, 1.0, 0
        self.alive: dict[int, list[int]] = {}
        self.made, self.destroyed, self.ran, self.seen = 0, [], [], set()
        for name, arguments in cublaslt.ARGUMENTS.items():
            called = getattr(self, name.removeprefix("cublasLt"), None) or self.life(name)
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(called))
        monkeypatch.setattr(cublaslt, "library", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: HANDLE)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event

    def life(self, name: str) -> Callable[..., int]:
        """What creates or destroys a descriptor; an address is wider than an int."""

        def create(out: int, *arguments: int) -> int:
            self.made += 1
            at = (self.made << 36) + 16
            self.alive[at] = list(arguments)
            c_void_p.from_address(out).value = at
            return 0

        def destroy(descriptor: int) -> int:
            self.destroyed.append(self.alive.pop(descriptor))
            return 0

        return create if name.endswith("Create") else destroy

    def MatmulDescSetAttribute(self, descriptor: int, attribute: int, value: int, size: int) -> int:
        self.alive[descriptor].append((attribute, c_int32.from_address(value).value))
        return 0 if size == 4 else INVALID_VALUE

    def MatmulPreferenceSetAttribute(self, preference: int, attribute: int, value: int, size: int) -> int:
        self.alive[preference].append((attribute, c_uint64.from_address(value).value))
        return 0 if size == 8 else INVALID_VALUE

    def MatmulAlgoGetHeuristic(self, handle, operation, a, b, c, d, preference, asked, results, count) -> int:
        # 1: the most workspace
        if handle != HANDLE or c != d or self.alive[preference] != [(1, cublaslt.WORKSPACE_BYTES)]:
            return INVALID_VALUE
        found = min(asked, len(self.algorithms))
        for at, candidate in enumerate((cublaslt.Candidate * found).from_address(results)):
            candidate.algorithm.data[:] = [at] * 8
            candidate.state = self.state[at]
        c_int32.from_address(count).value = found
        return self.status

    def matrix(self, pointer: int, layout: int) -> torch.Tensor:
        """A column-major matrix as a tensor that views its memory."""
        data_type, rows, columns, leading = self.alive[layout]
        memory = (ctypes.c_uint16 * (leading * columns)).from_address(pointer)
        return torch.frombuffer(memory, dtype=DTYPES[data_type]).view(columns, leading)[:, :rows].t()

    def Matmul(self, handle, operation, alpha, a, a_is, b, b_is, beta, c, c_is, d, d_is, algorithm, *workspace) -> int:
        number, *same = (c_uint64 * 8).from_address(algorithm)
        self.seen.add((handle, *workspace))
        self.ran.append(number)
        took = self.algorithms[number]
        compute, scale, *attributes = self.alive[operation]
        factors = [ctypes.c_float.from_address(each).value for each in (alpha, beta)]
        # fp32 sums and scales; A transposed; nothing of C is read
        if (compute, scale, attributes, factors, c, c_is) != (68, 0, [(3, 1)], [1.0, 0.0], d, d_is):
            return INVALID_VALUE
        if took is None or same != [number] * 7:
            return EXECUTION_FAILED
        self.now += took
        product = self.matrix(a, a_is).float().t() @ self.matrix(b, b_is).float()
        self.matrix(d, d_is).copy_(self.factor * product)
        return 0


def inputs(dtype: torch.dtype = torch.bfloat16, count: int = 2) -> Rotation:
    return Rotation(
        [
            bench_nm_spmm.Inputs(torch.randn(TOKENS, COLUMNS).to(dtype), torch.randn(ROWS, COLUMNS).to(dtype), None)
            for _ in range(count)
        ]
    )


def searched(of: Rotation) -> cublaslt.Product | Missing:
    return bench_nm_spmm.checked(bench_nm_spmm.cublaslt_best, of)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fastest_is_found_and_multiplies_row_major(dtype, monkeypatch):
    library = FakeLibrary(monkeypatch, [9.0, None, 5.0, 1.0, 7.0])
    library.state[3] = NOT_SUPPORTED
    of = inputs(dtype, 3)
    product = searched(of)
    assert product.algorithm.data[:] == [2] * 8 and product.tried == 3
    assert 3 not in library.ran
    for turn in range(5):
        y = product(turn)
        assert y.is_contiguous() and y.dtype == dtype
        torch.testing.assert_close(y, F.linear(of[turn].x, of[turn].dense), rtol=1e-2, atol=1e-2)
    assert library.ran[-5:] == [2] * 5


def test_many_algorithms_are_sieved_by_one_timing_and_told_apart_by_more(monkeypatch):
    count = 2 * cublaslt.MOST_ALGORITHMS
    library = FakeLibrary(monkeypatch, [float(count - at) for at in range(count)])
    product = searched(inputs())
    assert product.tried == cublaslt.MOST_ALGORITHMS and product.algorithm.data[0] == cublaslt.MOST_ALGORITHMS - 1
    runs = [library.ran.count(at) for at in range(cublaslt.MOST_ALGORITHMS)]
    # each once to load it and once to time it; then the finalists, and the best once more to check it
    expected = [2] * (cublaslt.MOST_ALGORITHMS - cublaslt.FINALISTS) + [2 + cublaslt.ROUNDS] * cublaslt.FINALISTS
    expected[-1] += 1
    assert runs == expected


def test_a_call_takes_the_stream_that_is_current_and_one_workspace(monkeypatch):
    library = FakeLibrary(monkeypatch, [2.0])
    product = searched(inputs())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + 16))
    product(0)
    known = (HANDLE, product.workspace.data_ptr(), cublaslt.WORKSPACE_BYTES)
    assert library.seen == {(*known, STREAM), (*known, STREAM + 16)}
    assert product.workspace.nbytes == cublaslt.WORKSPACE_BYTES


def test_descriptors_end_with_the_product(monkeypatch):
    library = FakeLibrary(monkeypatch, [2.0, None])
    product = searched(inputs())
    assert len(library.alive) == library.made == 5  # operation, three layouts, preference
    del product
    gc.collect()
    assert not library.alive and len(library.destroyed) == 5


@pytest.mark.parametrize(
    ("algorithms", "changed", "why"),
    [
        ([], {}, "no algorithm of cuBLASLt runs"),
        ([None, None], {}, "no algorithm of cuBLASLt runs"),
        ([2.0], {"status": NOT_SUPPORTED}, "cublasLtMatmulAlgoGetHeuristic gives status 15"),
        ([2.0], {"factor": 1.1}, "its product is off by "),
    ],
)
def test_a_search_that_fails_is_a_missing_peer(algorithms, changed, why, monkeypatch):
    library = FakeLibrary(monkeypatch, algorithms)
    for name, value in changed.items():
        setattr(library, name, value)
    missing = searched(inputs())
    assert isinstance(missing, Missing) and why in missing.why
    gc.collect()
    assert not library.alive and len(library.destroyed) == library.made > 0


def test_inputs_that_are_not_alike_are_refused(monkeypatch):
    library = FakeLibrary(monkeypatch, [2.0])
    x, weight = torch.zeros(TOKENS, COLUMNS).half(), torch.zeros(ROWS, COLUMNS).half()
    for pairs in ([(x, weight), (x[:3], weight)], [(x, weight.t().contiguous().t())], [(x, weight.bfloat16())]):
        with pytest.raises(ValueError, match="x and weight are"):
            cublaslt.best(pairs)
    assert library.made == 0


@pytest.mark.parametrize("tokens", [64, 2048])
def test_it_is_searched_for_where_a_figure_wants_it(tokens, monkeypatch):
    def row() -> Measured:
        return bench_nm_spmm.measured(Context(dry=True), "2:4", True, 48, 64, tokens)

    monkeypatch.setattr(runner, "ROW_SECONDS", 0.0)
    assert ("spmm-dense" in bench_nm_spmm.figures(True, tokens)) == (tokens >= 2048)
    assert ("cuBLASLt best" in row().missing) == (tokens >= 2048)
    FakeLibrary(monkeypatch, [2.0, 1.0])
    assert row().extra == ({"cublaslt_algorithms": 2} if tokens >= 2048 else {})
    assert ("cuBLASLt best" in row().ratio) == (tokens >= 2048)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has cuBLASLt")
def test_a_torch_without_cublaslt_says_so(monkeypatch):
    cublaslt.library.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: HANDLE)
    assert "libcublasLt.so" in searched(inputs()).why


def test_structures_are_those_of_the_header():
    """cublasLt.h: an algorithm of 8 words, then size_t, an enum, a float and 4 ints."""
    assert ctypes.sizeof(cublaslt.Algorithm) == 64 and ctypes.sizeof(cublaslt.Candidate) == 96
    offsets = [getattr(cublaslt.Candidate, name).offset for name, _ in cublaslt.Candidate._fields_]
    assert offsets == [0, 64, 72, 76, 80]
