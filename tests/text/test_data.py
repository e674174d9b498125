"""The three-way split of a text's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import msp
from msp.errors import MspError, UsageError
from msp.text.token_sets import POOL_FACTOR, make_token_sets, noised, read_windows, save_tokens, token_windows


def test_windows():
    assert token_windows(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert token_windows(torch.arange(2), 3).shape == (0, 3)
    with pytest.raises(UsageError, match="least is 2"):
        token_windows(torch.arange(4), 1)


def test_read_windows(tmp_path: Path):
    path = str(tmp_path / "t.safetensors")
    save_tokens(range(100), path)
    assert read_windows(path, None, 100, window=7).shape == (14, 7)
    assert read_windows(path, None, 100, window=7, tokens=30).shape == (4, 7)
    assert read_windows(path, None, 100, window=7, tokens=3).shape == (1, 7)
    with pytest.raises(MspError, match="100 tokens found, 101 needed"):
        read_windows(path, None, 100, window=101)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> tuple[str, str]:
    """Two sources in which every token occurs once, so that a token tells where it came from."""
    folder = tmp_path_factory.mktemp("numbered")
    save_tokens(range(4_000), folder / "a.safetensors")
    save_tokens(range(10_000, 11_000), folder / "b.safetensors")
    return str(folder / "a.safetensors"), str(folder / "b.safetensors")


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(2, 40),
    calibration=st.integers(0, 900),
    fitness=st.integers(0, 900),
    test=st.integers(0, 900),
    seed=st.integers(0, 2**40),
    other=st.booleans(),
)
def test_no_token_is_in_two_sets(numbered, window, calibration, fitness, test, seed, other):
    options = {"calibration_tokens": calibration, "fitness_tokens": fitness, "test_tokens": test, "window": window}
    evaluate = numbered[1] if other else None
    sets = make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=seed, **options)
    tokens = [*sets.calibration.flatten().tolist(), *sets.fitness.flatten().tolist(), *sets.test.flatten().tolist()]
    assert len(tokens) == len(set(tokens))
    for windows, wanted in ((sets.calibration, calibration), (sets.fitness, fitness)):
        assert windows.shape == (max(1, wanted // window) if wanted else 0, window)
        assert (windows.diff(dim=1) == 1).all(), "a window is consecutive text"
    assert sets.sources["calibration_tokens"] == sets.calibration.numel()
    again = make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=seed, **options)
    for name in ("calibration", "fitness", "test"):
        assert torch.equal(getattr(again, name), getattr(sets, name))


@pytest.mark.parametrize("other", [True, False])
def test_seeds_change_what_is_drawn_and_never_the_test(numbered, other: bool):
    options = {"window": 10, "calibration_tokens": 200, "fitness_tokens": 100, "test_tokens": 150}
    evaluate = numbered[1] if other else None
    drawn = [make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=s, **options) for s in range(4)]
    assert all(torch.equal(sets.test, drawn[0].test) for sets in drawn)
    assert len({tuple(sets.calibration.flatten().tolist()) for sets in drawn}) == 4
    assert len({tuple(sets.fitness.flatten().tolist()) for sets in drawn}) == 4
    bigger = make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=0, **options | {"fitness_tokens": 900})
    assert torch.equal(bigger.test, drawn[0].test), "nor does asking for more calibration text change it"


def test_noise_replaces_a_share_of_the_fitness_tokens_by_others_of_theirs(numbered):
    options = {"window": 50, "calibration_tokens": 500, "fitness_tokens": 2500, "test_tokens": 500, "seed": 1}
    clean, noisy, again = (
        make_token_sets(numbered[0], None, 20_000, fitness_noise=x, **options) for x in (0, 0.2, 0.2)
    )
    changed = noisy.fitness != clean.fitness
    assert 0.15 < float(changed.float().mean()) < 0.25
    assert not changed[:, 0].any()
    assert set(noisy.fitness.flatten().tolist()) <= set(clean.fitness.flatten().tolist())
    assert torch.equal(noisy.fitness, again.fitness)
    assert torch.equal(noisy.calibration, clean.calibration)
    assert torch.equal(noisy.test, clean.test)
    assert not torch.equal(noised(clean.fitness, 0.2, 2), noisy.fitness)
    assert noisy.sources["fitness_noise"] == 0.2


def test_evaluating_on_the_calibration_text_holds_its_windows_out(numbered):
    source = numbered[0]
    same = str(Path(source).parent / "." / "x" / ".." / Path(source).name)
    options = {"window": 10, "calibration_tokens": 3000, "fitness_tokens": 500, "test_tokens": 500, "seed": 1}
    (Path(source).parent / "x").mkdir(exist_ok=True)
    sets = make_token_sets(source, None, 20_000, evaluate=same, **options)
    everything = torch.cat([sets.calibration.flatten(), sets.fitness.flatten(), sets.test.flatten()])
    assert len(everything.unique()) == 4000
    assert sets.sources["evaluate"].endswith("(held out)")


def test_draws_come_from_a_pool_and_not_just_the_beginning(numbered):
    sets = make_token_sets(
        numbered[0], None, 20_000, window=10, calibration_tokens=100, fitness_tokens=0, test_tokens=0, seed=3
    )
    assert int(sets.calibration.max()) > 200
    assert int(sets.calibration.max()) < POOL_FACTOR * 100
    assert sets.fitness.shape == (0, 10)


def test_too_short_a_text_says_what_was_found_and_needed(numbered):
    with pytest.raises(MspError, match=r"4000 tokens found, 4100 needed \(200 calibration, 200 fitness and 10 test"):
        make_token_sets(
            numbered[0], None, 20_000, window=10, calibration_tokens=2000, fitness_tokens=2000, test_tokens=100, seed=0
        )
    with pytest.raises(MspError, match="1000 tokens found, 2000 needed"):
        make_token_sets(
            numbered[0],
            None,
            20_000,
            evaluate=numbered[1],
            window=2000,
            calibration_tokens=1,
            fitness_tokens=0,
            test_tokens=100,
            seed=0,
        )


def test_wrong_counts_are_wrong_usage(numbered):
    options = {"window": 10, "calibration_tokens": 100, "fitness_tokens": 0, "test_tokens": 100, "seed": 0}
    for change in ({"window": 1}, {"calibration_tokens": -1}, {"fitness_tokens": -5}, {"test_tokens": None}):
        with pytest.raises(UsageError):
            make_token_sets(numbered[0], None, 20_000, **options | change)


def test_the_evaluation_file_is_looked_for_before_anything_is_read(numbered, tmp_path: Path):
    with pytest.raises(MspError, match=r"nowhere\.txt: no such file"):
        make_token_sets(
            numbered[0],
            None,
            1,
            evaluate=str(tmp_path / "nowhere.txt"),
            window=10,
            calibration_tokens=10,
            fitness_tokens=0,
            test_tokens=10,
            seed=0,
        )


@pytest.mark.parametrize("seed", [-1, -(1 << 63), 1 << 63, 10**30, 1.5])
def test_what_is_no_seed_is_refused(seed: object, text: str) -> None:
    """torch takes negative ones, and numpy does not."""
    with pytest.raises(UsageError, match=r"seed .* is not a whole number from 0 to 9223372036854775807"):
        make_token_sets(text, None, 96, window=16, calibration_tokens=16, fitness_tokens=16, test_tokens=16, seed=seed)
    with pytest.raises(UsageError, match="seed"):
        msp.prune("absent", sparsity=0.5, seed=seed, calibration=text)
