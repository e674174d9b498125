"""``nm_linear`` and ``nm_unpack`` with numpy alone: the sanitized module has no torch beside it."""

from __future__ import annotations

import numpy as np
import pytest
from isas import every_linear_path
from native_cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, Case, draw, make_case, stored, widened
from numpy.typing import NDArray

ROUNDING = {FLOAT32: 2.0**-24, FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}


def assert_product(
    y: NDArray[np.generic], x: NDArray[np.generic], case: Case, bias: NDArray[np.generic] | None = None
) -> None:
    weight = np.where(case.kept(), case.weight, 0.0).astype(np.float64)
    wide = widened(x, case.dtype).astype(np.float64)
    added = 0.0 if bias is None else widened(bias, case.dtype).astype(np.float64)
    expected, size = wide @ weight.T + added, np.abs(wide) @ np.abs(weight.T) + np.abs(added)
    bound = ROUNDING[case.dtype] * np.abs(expected) + 64 * ROUNDING[FLOAT32] * size + 1e-6
    assert (np.abs(widened(y, case.dtype) - expected) <= bound).all()


@every_linear_path
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_every_level_and_odd_sizes(isa: str, group_size: int, dtype: int) -> None:
    rng = np.random.default_rng([3, group_size, dtype])
    for n in range(group_size + 1):
        rows, groups = int(rng.choice([1, 2, 5, 17, 37])), int(rng.choice([1, 2, 3, 7, 9, 33]))
        case = make_case(rng, rows, groups * group_size, group_size, n, dtype)
        bits = np.dtype(f"u{case.stored.itemsize}")
        np.testing.assert_array_equal(case.run_unpack().view(bits), np.where(case.kept(), case.stored.view(bits), 0))
        for tokens in (0, 1, int(rng.integers(2, 18)), 65):
            x = stored(draw(rng, tokens, groups * group_size), dtype)
            bias = stored(draw(rng, rows), dtype) if tokens % 2 else None
            assert_product(case.run_linear(x, bias), x, case, bias)


@every_linear_path
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("columns", [3072, 3104, 4744, 9000])
def test_rows_longer_than_the_tokens_in_cache(isa: str, columns: int, dtype: int) -> None:
    rng = np.random.default_rng([4, columns, dtype])
    case = make_case(rng, 20, columns, 8, 3, dtype)
    for tokens in (1, 2, 7, 8, 15, 64):
        x = stored(draw(rng, tokens, columns), dtype)
        bias = stored(draw(rng, 20), dtype) if tokens % 2 else None
        assert_product(case.run_linear(x, bias), x, case, bias)


# vectors of tokens and the few behind them; tiles, of four vectors; and bands, of 512 tokens
MANY_TOKENS = [41, 48, 49, 52, 53, 63, 64, 65, 68, 80, 84, 100, 129, 192, 211, 512, 513, 530]


@pytest.mark.parametrize("isa", ["avx512bf16"], indirect=True)
@pytest.mark.parametrize("group_size", [4, 8, 16, 32])
def test_many_tokens_at_every_level(isa: str, group_size: int) -> None:
    rng = np.random.default_rng([5, group_size])
    for n in range(group_size + 1):
        # less than a vector of rows, parts of a tile of them, a panel of 48 and more
        rows = int(rng.choice([1, 5, 6, 7, 12, 13, 31, 47, 48, 49, 97]))
        columns = int(rng.choice([1, 2, 7, 33, 65])) * group_size
        case = make_case(rng, rows, columns, group_size, n)
        for tokens in rng.choice(MANY_TOKENS, 3, replace=False):
            x = stored(draw(rng, tokens, columns), BFLOAT16)
            bias = stored(draw(rng, rows), BFLOAT16) if n % 2 else None
            assert_product(case.run_linear(x, bias), x, case, bias)


@pytest.mark.parametrize("isa", ["avx512bf16"], indirect=True)
@pytest.mark.parametrize("tokens", MANY_TOKENS)
def test_every_number_of_many_tokens(isa: str, tokens: int) -> None:
    rng = np.random.default_rng([6, tokens])
    case = make_case(rng, 53, 552, 8, 3)
    x, bias = (stored(draw(rng, *shape), BFLOAT16) for shape in ((tokens, 552), (53,)))
    assert_product(case.run_linear(x, bias), x, case, bias)
