"""The searches that ours is compared with, on a fitness whose minimum is known."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from families import nm_unit

from msp.allocators import Problem, RampBest, SearchSettings, get_allocator
from msp.allocators import allocate as run
from msp.allocators.evolution import fisher_seeds
from msp.engine import evolution
from msp.engine.fitness import Key
from msp.engine.operators import crossover, swap
from msp.plan.budget import Budget
from msp.plan.levels import Levels, kept_weights

STEPS = [3, 5, 3, 4]
UNITS = tuple(nm_unit(f"u{i}", 16 * STEPS[i % 4], 16, i // 4, f"k{i % 4}") for i in range(24))
BUDGET = Budget.for_units(UNITS, sum(unit.weights for unit in UNITS) // 4)
# Falls with depth by more than the default ramp does, and by what no ramp says from unit to unit.
OPTIMUM = np.array([6.6 - unit.block for unit in UNITS]) + np.random.default_rng(1).normal(0, 1.5, len(UNITS))


class Bowl:
    """Squared distance to OPTIMUM, a token for each stage a candidate was measured in."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.stages = len(shares)
        self.tokens = 0
        self.seen: list[tuple[int, Levels]] = []

    def __call__(self, candidates: Sequence[Key], stage: int, draw: int = 0) -> list[float]:
        self.seen += [(stage, np.array(key)) for key in candidates]
        self.tokens += len(candidates)
        return [float(np.square(np.array(key) - OPTIMUM).sum()) for key in candidates]


class Evidence:
    identity: ClassVar[dict[str, str]] = {"fitness": "a bowl"}

    def __init__(self) -> None:
        self.bowl = Bowl(())

    def fisher_traces(self) -> Mapping[str, float]:
        return {unit.name: float(np.exp(6 - unit.block)) for unit in UNITS}

    @contextmanager
    def fitness(self, shares: Sequence[float]) -> Iterator[Bowl]:
        self.bowl = Bowl(shares)
        yield self.bowl


def allocate(name: str, **settings: Any):
    evidence = Evidence()
    problem = Problem(UNITS, BUDGET, evidence, search=SearchSettings(**settings))  # type: ignore[arg-type]
    return get_allocator(name).allocate(problem), evidence.bowl


@pytest.mark.parametrize("name", ["msp", "msp-paper", "msp-random", "evopress"])
def test_a_search_comes_nearer_and_counts_what_it_spent(name: str) -> None:
    found, bowl = allocate(name, tokens=2000)
    assert found.history[-1].best < 0.6 * found.history[0].best
    assert found.tokens == bowl.tokens == found.history[-1].tokens >= 2000
    assert found.history[-2].tokens < 2000
    assert found.evaluations == len({tuple(levels) for _, levels in bowl.seen})
    assert BUDGET.is_met(kept_weights(found.levels, UNITS))
    assert found.history[-1].best == pytest.approx(float(np.square(found.levels - OPTIMUM).sum()))


def test_evopress_starts_uniform_and_moves_by_a_few_swaps_of_one_parent() -> None:
    _, bowl = allocate("evopress", evaluations=64 * 5)
    uniform = get_allocator("uniform").allocate(Problem(UNITS, BUDGET, SimpleNamespace())).levels  # type: ignore[arg-type]
    assert [(stage, *levels) for stage, levels in bowl.seen[:3]] == [(stage, *uniform) for stage in range(3)]
    stages = [stage for stage, _ in bowl.seen[3:]]
    assert [stages.count(stage) for stage in range(3)] == [5 * 64, 5 * 8, 5 * 2]
    first_generation = [levels for stage, levels in bowl.seen[3:] if stage == 0][:64]
    # At most three swaps of up to two levels, and what the repair of each takes.
    assert all(0 < np.count_nonzero(levels - uniform) <= 12 for levels in first_generation)


def test_the_paper_has_one_stage_and_fisher_seeds() -> None:
    found, bowl = allocate("msp-paper", evaluations=32)
    assert {stage for stage, _ in bowl.seen} == {0}
    problem = Problem(UNITS, BUDGET, Evidence())  # type: ignore[arg-type]
    wanted = list(dict.fromkeys(map(tuple, fisher_seeds(problem))))
    assert [tuple(levels) for _, levels in bowl.seen[: len(wanted)]] == wanted
    assert len(bowl.seen) == found.evaluations == len(wanted) + 32


@pytest.mark.parametrize(("name", "bred"), [("msp", 0), ("evopress", 0), ("msp-paper", 0.5)])
def test_what_share_of_the_offspring_are_crossovers(name: str, bred: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Levels:
        calls.append("crossover")
        return crossover(*arguments)

    def mutated(*arguments: Any) -> Levels:
        calls.append("swap")
        return swap(*arguments)

    monkeypatch.setattr(evolution, "crossover", counted)
    monkeypatch.setattr(evolution, "swap", mutated)
    # without sensitivities msp breeds at random, too
    allocate(name, evaluations=64 * 10, constants={"patience": 0})
    children = calls.count("swap")
    assert children >= 64 * 10
    assert 0.8 * bred * children <= calls.count("crossover") <= 1.2 * bred * children


def test_the_random_search_measures_sensitivities_and_reads_no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Evidence) -> Mapping[str, float]:
        raise AssertionError("traces were read")

    monkeypatch.setattr(Evidence, "fisher_traces", refuse)
    _, bowl = allocate("msp-random", evaluations=32)
    _, plain = allocate("msp-random", evaluations=32, constants={"patience": 0})
    assert len(bowl.seen) >= len(plain.seen) + len(UNITS)  # a move of every unit was measured besides
    with pytest.raises(AssertionError, match="traces were read"):
        allocate("msp", evaluations=16)


def test_ours_empties_runs_of_blocks_and_races_what_comes_of_it() -> None:
    found, bowl = allocate("msp", evaluations=16, constants={"patience": 0})
    first = [levels for stage, levels in bowl.seen if stage == 0][:-16]
    empty = [{unit.block for unit, level in zip(UNITS, levels, strict=True) if level} for levels in first]
    runs = [set(range(6)) - blocks for blocks in empty if len(blocks) < 6]
    assert {tuple(run) for run in runs} == {(block,) for block in range(6)}
    assert all(BUDGET.is_met(kept_weights(levels, UNITS)) for levels in first)
    assert sum(stage == 2 for stage, _ in bowl.seen) <= 6 + 2
    assert found.history[0].evaluations == len({tuple(levels) for levels in first})


@pytest.mark.parametrize("limits", [{}, {"tokens": 2000}, {"evaluations": 500}])
def test_the_best_ramp_is_chosen_on_fitness_tokens(limits: dict[str, int]) -> None:
    found, bowl = allocate("ramp-best", **limits)
    assert 1 < len(bowl.seen) <= len(RampBest().slopes)
    assert found.evaluations == found.tokens == len(bowl.seen)
    ramps = [get_allocator("ramp", slope=slope) for slope in RampBest().slopes]
    problem = Problem(UNITS, BUDGET, SimpleNamespace())  # type: ignore[arg-type]
    losses = [float(np.square(ramp.allocate(problem).levels - OPTIMUM).sum()) for ramp in ramps]
    assert found.history[-1].best == min(losses) < losses[1]
    assert (found.levels == ramps[int(np.argmin(losses))].allocate(problem).levels).all()


@pytest.mark.parametrize(("slope", "says"), [(0.001, True), (0.5, False)])
def test_an_allocator_that_rounds_to_uniform_says_so(slope: float, says: bool) -> None:
    problem = Problem(UNITS, BUDGET, Evidence())  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(get_allocator("ramp", slope=slope), problem)
        run(get_allocator("uniform"), problem)
    assert [str(each.message).split(":")[0] for each in caught] == [
        "allocator 'ramp' gives every unit the level that uniform gives"
    ] * says


def test_no_allocator_is_blamed_where_there_is_no_choice() -> None:
    unit = nm_unit("u", 1600, 16, 0, "k")
    problem = Problem((unit,), Budget.for_units((unit,), 400), Evidence())  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(get_allocator("ramp"), problem)
