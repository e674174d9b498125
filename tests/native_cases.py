"""Calls of the C++ kernels by address, as the dispatch makes them, and a selection in numpy to hold them against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

native = pytest.importorskip("msp._cpu", reason="the compiled module msp._cpu is not built")

FLOAT32, FLOAT16, BFLOAT16 = range(3)
MAGNITUDE, SCALED, RELATIVE, FISHER, GIVEN = range(5)
DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
KINDS = {"magnitude": MAGNITUDE, "scaled": SCALED, "relative": RELATIVE, "fisher": FISHER, "given": GIVEN}


def stored(numbers: NDArray[np.float32], dtype: int) -> NDArray[np.generic]:
    """``numbers`` as a tensor of this dtype holds them; bfloat16, which numpy lacks, as its bits, cut off."""
    if dtype == BFLOAT16:
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(np.float16 if dtype == FLOAT16 else np.float32)


def widened(numbers: NDArray[np.generic], dtype: int) -> NDArray[np.float32]:
    """The inverse of ``stored``."""
    if dtype == BFLOAT16:
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def moved(array: NDArray[np.generic], shift: int) -> NDArray[np.generic]:
    """A copy that begins ``shift`` elements further on in memory than an allocator would have it."""
    room = np.empty(array.size + shift, array.dtype)[shift:].reshape(array.shape)
    room[:] = array
    return room


class Output:
    """Poisoned memory for a kernel to fill, with a canary behind it; ``shift`` elements further on than allocated."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, shift: int = 0) -> None:
        self._shape, self._size = shape, math.prod(shape)
        self._memory = np.full(shift + self._size + 64, 77, dtype)[shift:]
        self.address = self._memory.ctypes.data

    def read(self) -> NDArray[np.generic]:
        assert (self._memory[self._size :] == 77).all(), "wrote past the end of an output"
        return self._memory[: self._size].reshape(self._shape)


@dataclass
class Case:
    """A weight with the terms of its scores, what the kernels make of it, and what must come out."""

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
    shift: int = 0

    @property
    def terms(self) -> tuple[NDArray[np.float32] | None, ...]:
        return self.column_scale, self.row_term, self.column_term, self.matrix

    @property
    def scored(self) -> dict[str, int]:
        """The arguments of ``nm_select`` and ``nm_rank`` for the weight and its scores."""
        names = ("column_scale_ptr", "row_term_ptr", "column_term_ptr", "matrix_ptr")
        terms = (0 if term is None else term.ctypes.data for term in self.terms)
        rows, columns = self.stored.shape
        return {
            "weight_ptr": self.stored.ctypes.data,
            "dtype_code": self.dtype,
            "rows": rows,
            "columns": columns,
            "group_size": self.group_size,
            "score_kind": self.kind,
            **dict(zip(names, terms, strict=True)),
        }

    def packed_rows(self, values: NDArray[np.generic], bitmask: NDArray[np.generic], **change: int) -> object:
        """The struct by which ``nm_linear`` and ``nm_unpack`` know a packed weight; it holds addresses only."""
        rows, columns = self.stored.shape
        arguments = {
            "values_ptr": values.ctypes.data,
            "bitmask_ptr": bitmask.ctypes.data,
            "dtype_code": self.dtype,
            "rows": rows,
            "columns": columns,
            "group_size": self.group_size,
            "n": self.n,
        }
        return native.PackedRows(**(arguments | change))

    @property
    def weight(self) -> NDArray[np.float32]:
        return widened(self.stored, self.dtype)

    def moved(self, shift: int) -> Case:
        """The same with every array, inputs and outputs, ``shift`` elements further on in memory."""
        arrays = {name: array for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        return replace(self, shift=shift, **{name: moved(array, shift) for name, array in arrays.items()})

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

    def ranks(self) -> NDArray[np.uint8]:
        """How many of its group come before each in a stable sort."""
        scores = self.scores().reshape(-1, self.group_size)
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.argsort(order, axis=1).astype(np.uint8).reshape(self.stored.shape)

    def run(self, threads: int = 1) -> tuple[NDArray[np.generic], NDArray[np.generic], int]:
        """Values, bitmask and the count that ``nm_select`` returns."""
        rows, columns = self.stored.shape
        values = Output((rows, columns // self.group_size * self.n), self.stored.dtype, self.shift)
        bitmask = Output((rows, (columns + 7) // 8), np.uint8, self.shift)
        wrong = native.nm_select(
            **self.scored,
            n=self.n,
            compliant=self.compliant,
            values_ptr=values.address,
            bitmask_ptr=bitmask.address,
            threads=threads,
        )
        return values.read(), bitmask.read(), wrong

    def run_rank(self, threads: int = 1) -> tuple[NDArray[np.generic], int]:
        """Ranks and the count that ``nm_rank`` returns."""
        rank = Output(self.stored.shape, np.uint8, self.shift)
        wrong = native.nm_rank(**self.scored, rank_ptr=rank.address, threads=threads)
        return rank.read(), wrong

    def run_keep(self, rank: NDArray[np.generic], n: int, threads: int = 1) -> NDArray[np.generic]:
        out = Output(self.stored.shape, self.stored.dtype, self.shift)
        native.nm_keep(self.stored.ctypes.data, rank.ctypes.data, out.address, self.dtype, self.stored.size, n, threads)
        return out.read()

    def run_unpack(self, threads: int = 1) -> NDArray[np.generic]:
        """The dense weight, from what ``run`` packs."""
        values, bitmask, _ = self.run()
        dense = Output(self.stored.shape, self.stored.dtype, self.shift)
        native.nm_unpack(self.packed_rows(values, bitmask), dense.address, threads)
        return dense.read()

    def run_linear(
        self, x: NDArray[np.generic], bias: NDArray[np.generic] | None = None, threads: int = 1
    ) -> NDArray[np.generic]:
        """``x`` ``[tokens, columns]`` times what ``run`` packs."""
        values, bitmask, _ = self.run()
        y = Output((len(x), len(self.stored)), self.stored.dtype, self.shift)
        weight, offset = self.packed_rows(values, bitmask), 0 if bias is None else bias.ctypes.data
        native.nm_linear(weight, x.ctypes.data, offset, y.address, len(x), threads)
        return y.read()

    def check(self, threads: int = 1) -> None:
        values, bitmask, wrong = self.run(threads)
        kept = self.kept()
        padded = np.pad(kept, ((0, 0), (0, -kept.shape[1] % 8)))
        np.testing.assert_array_equal(bitmask, np.packbits(padded, axis=1, bitorder="little"))
        bits = np.dtype(f"u{self.stored.itemsize}")
        np.testing.assert_array_equal(values.view(bits).ravel(), self.stored[kept].view(bits))
        assert wrong == 0

    def check_rank(self, threads: int = 1) -> None:
        rank, wrong = self.run_rank(threads)
        np.testing.assert_array_equal(rank, self.ranks())
        assert wrong == 0


def draw(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Normal numbers of many magnitudes."""
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-8, 3, shape))).astype(np.float32)


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

    def numbers(*shape: int) -> NDArray[np.float32]:
        return rng.integers(-2, 3, shape).astype(np.float32) if ties else draw(rng, *shape)

    weight = numbers(rows, columns) * np.float32(scale)
    weight[rng.random(weight.shape) < 0.1] = 0.0
    weight[rng.random(weight.shape) < 0.1] = -0.0
    case = Case(stored(weight, dtype), dtype, group_size, n, compliant, kind)
    if kind in (SCALED, RELATIVE):
        case.column_scale = numbers(columns)
    if kind == RELATIVE:
        case.row_term, case.column_term = numbers(rows), numbers(columns)
    if kind in (FISHER, GIVEN):
        case.matrix = numbers(rows, columns)
    return case


def make_factor(rng: np.random.Generator, columns: int) -> NDArray[np.float32]:
    """What ``obs_prune`` takes as the factor of an inverse Hessian; NaN below the diagonal, where nobody may read."""
    factor = np.triu(rng.standard_normal((columns, columns)) / columns, 1).astype(np.float32)
    np.fill_diagonal(factor, rng.uniform(0.5, 1.5, columns))
    factor[np.tril_indices(columns, -1)] = np.nan
    return factor


def prune(
    weight: NDArray[np.generic], factor: NDArray[np.generic], group_size: int, n: int, threads: int = 1, shift: int = 0
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """What ``obs_prune`` makes of a float32 ``weight`` ``[R, K]``: updated, and what was kept."""
    updated, kept = Output(weight.shape, np.float32, shift), Output(weight.shape, np.uint8, shift)
    native.obs_prune(
        weight_ptr=weight.ctypes.data,
        factor_ptr=factor.ctypes.data,
        updated_ptr=updated.address,
        kept_ptr=kept.address,
        rows=weight.shape[0],
        columns=weight.shape[1],
        group_size=group_size,
        n=n,
        threads=threads,
    )
    return updated.read(), kept.read()
