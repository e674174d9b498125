"""What the surrogate predicts on losses whose law is known."""

import numpy as np
import pytest

from msp.patterns import Unit
from msp.search.surrogate import Surrogate

UNITS = [Unit(f"u{i}", (f"u{i}",), 64 * (3 if i % 3 else 5), 8, i // 3, f"k{i % 3}") for i in range(18)]
WORTH = np.random.default_rng(0).uniform(0.5, 2, len(UNITS))


def loss(key: tuple[int, ...]) -> float:
    """Every unit's own convex price for what it lacks, multiplied: additive in the logarithm."""
    return float(np.exp((WORTH * np.square(1 - np.array(key) / 8)).sum() / 4))


def drawn(count: int, seed: int) -> list[tuple[int, ...]]:
    return [tuple(map(int, key)) for key in np.random.default_rng(seed).integers(0, 9, (count, len(UNITS)))]


def correlation(surrogate: Surrogate, seed: int) -> float:
    keys = drawn(200, seed)
    return float(np.corrcoef(surrogate.predict(keys), np.log([loss(key) for key in keys]))[0, 1])


def test_a_law_that_it_can_express_is_learned() -> None:
    surrogate = Surrogate(UNITS)
    assert surrogate.fit({(0, key): loss(key) for key in drawn(150, 1)})
    assert correlation(surrogate, 2) > 0.99


def test_few_candidates_already_tell_something() -> None:
    surrogate = Surrogate(UNITS)
    assert surrogate.fit({(0, key): loss(key) for key in drawn(30, 3)})
    assert correlation(surrogate, 4) > 0.5


def test_stages_may_differ_by_a_factor() -> None:
    keys = drawn(150, 5)
    surrogate = Surrogate(UNITS)
    assert surrogate.fit({(index % 3, key): loss(key) * 10 ** (index % 3) for index, key in enumerate(keys)})
    assert correlation(surrogate, 6) > 0.99


@pytest.mark.parametrize("bad", [float("inf"), 0.0])
def test_a_loss_without_a_logarithm_is_left_out(bad: float) -> None:
    measured = {(0, key): loss(key) for key in drawn(150, 7)}
    surrogate = Surrogate(UNITS)
    assert surrogate.fit(measured | {(0, key): bad for key in drawn(5, 8)})
    assert correlation(surrogate, 9) > 0.99


def test_too_few_losses_are_no_fit() -> None:
    (key,) = drawn(1, 10)
    assert not Surrogate(UNITS).fit({})
    assert not Surrogate(UNITS).fit({(0, key): loss(key)})
    assert not Surrogate(UNITS).fit({(0, key): float("nan") for key in drawn(9, 11)})


def test_units_with_few_or_single_levels_have_features() -> None:
    one = Unit("one", ("one",), 64, 8, 0, "k", UNITS[0].patterns[4:5], (32,))
    two = Unit("two", ("two",), 64, 8, 1, "k", UNITS[0].patterns[::8])
    surrogate = Surrogate([one, two])
    assert surrogate.fit({(0, (0, 0)): 4.0, (0, (0, 1)): 1.0})
    high, low = surrogate.predict([(0, 0), (0, 1)])
    assert high > low
