"""The C++ kernels against a selection written in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from native_cases import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    GIVEN,
    KINDS,
    RELATIVE,
    SCALED,
    make_case,
    make_factor,
    native,
    prune,
)


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
    values, bitmask = np.zeros(4096, np.uint32), np.zeros(4096, np.uint8)
    outputs = {"values_ptr": values.ctypes.data, "bitmask_ptr": bitmask.ctypes.data}
    with pytest.raises(ValueError, match=message):
        native.nm_select(**case.scored, n=case.n, compliant=case.compliant, **outputs, threads=1)


def test_misaligned_address_is_refused() -> None:
    case = make_case(np.random.default_rng(0), 2, 48, 8, 2)
    with pytest.raises(ValueError, match="weight_ptr is not a multiple of 2"):
        scored = {**case.scored, "weight_ptr": case.stored.ctypes.data + 1}
        native.nm_select(**scored, n=2, compliant=False, values_ptr=64, bitmask_ptr=64, threads=1)


@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_obs_prune(isa: str, group_size: int) -> None:
    """Its own tests are those of the op; this one runs in the sanitized module too."""
    rng = np.random.default_rng(group_size)
    for rows, columns in ((1, 1), (17, 5), (101, 9)):
        columns *= group_size
        weight, factor = rng.standard_normal((rows, columns)).astype(np.float32), make_factor(rng, columns)
        updated, kept = prune(weight, factor, group_size, group_size // 2, threads=3)
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
        native.nm_rank(**{**case.scored, "group_size": 32}, rank_ptr=rank, threads=1)
    with pytest.raises(ValueError, match="rank_ptr is null"):
        native.nm_rank(**case.scored, rank_ptr=0, threads=1)
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
