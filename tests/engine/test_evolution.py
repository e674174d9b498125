"""The evolutionary engine on functions whose minimum is known."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from landscapes import BUDGET, UNITS, Quadratic, start

from msp.engine.evolution import Evolution, EvolutionOptions
from msp.engine.fitness import Key
from msp.engine.operators import crossover, swap
from msp.engine.state import _checksum
from msp.errors import MspError, UsageError
from msp.plan.budget import Budget
from msp.plan.levels import Levels, kept_weights

# nothing but the seeds before the first generation
PLAIN = EvolutionOptions(emptied=0, patience=0)


def test_the_search_improves_and_keeps_the_budget() -> None:
    fitness = Quadratic()
    levels, history = Evolution(UNITS, BUDGET, start(), fitness, options=EvolutionOptions(generations=60)).run()
    assert BUDGET.is_met(kept_weights(levels, UNITS))
    assert history[-1].best < history[0].best / 2
    for stage, key in fitness.calls:
        assert stage == 0 or BUDGET.is_met(kept_weights(np.array(key), UNITS))


def test_the_best_never_gets_worse() -> None:
    _, history = Evolution(UNITS, BUDGET, start(), Quadratic(), options=EvolutionOptions(generations=30)).run()
    best = [step.best for step in history]
    assert best == sorted(best, reverse=True)


def test_nothing_is_measured_twice() -> None:
    fitness = Quadratic()
    Evolution(UNITS, BUDGET, start() * 3, fitness, options=EvolutionOptions(generations=20)).run()
    calls = list(zip(fitness.calls, fitness.draws, strict=True))
    assert len(calls) == len(set(calls))


def test_only_survivors_reach_the_last_stage() -> None:
    fitness = Quadratic()
    options = replace(PLAIN, generations=10, offspring=16, token_shares=(0.1, 1.0), survivors=(0.25,))
    Evolution(UNITS, BUDGET, start(), fitness, options=options).run()
    stages = [stage for stage, _ in fitness.calls]
    assert stages.count(0) == 1 + 160
    assert stages.count(1) == 1 + 40


def test_sensitivities_are_measured_at_the_best_until_they_lead_nowhere() -> None:
    class Watched(Quadratic):
        def __call__(self, candidates: Sequence[Key], stage: int, draw: int = 0) -> list[float]:
            if draw:
                around.append(np.array(candidates))
                draws.append(draw)
            return super().__call__(candidates, stage, draw)

    around: list[Levels] = []
    draws: list[int] = []
    options = EvolutionOptions(generations=30, patience=2)
    _, history = Evolution(UNITS, BUDGET, start(), Watched(), options=options).run()
    best = [step.best for step in history]
    ages = [len(best[:end]) - 1 - best.index(best[end - 1]) for end in range(1, len(best))]
    assert draws == [end + 1 for end, age in enumerate(ages) if age < 2] and 1 < len(draws) < 30
    for base, *probes in around:
        moved = np.array(probes) - base
        assert ((moved != 0).sum(1) == 1).all() and (abs(moved).sum(1) == 1).all()
        assert len(probes) == 2 * len(UNITS) - (base == 0).sum()


def test_sensitivities_that_would_pass_the_limit_are_not_measured() -> None:
    fitness, options = Quadratic(), EvolutionOptions(emptied=0).limited(tokens=30)
    Evolution(UNITS, BUDGET, start(), fitness, options=options).run()
    assert all(BUDGET.is_met(kept_weights(np.array(key), UNITS)) for _, key in fitness.calls)
    assert fitness.tokens >= 30


def test_a_race_may_have_more_stages() -> None:
    fitness = Quadratic(stages=5)
    options = EvolutionOptions(generations=4, token_shares=(0.1, 0.2, 0.4, 0.8, 1.0), survivors=(0.5, 0.5, 0.5, 0.5))
    levels, history = Evolution(UNITS, BUDGET, start(), fitness, options=options).run()
    assert history[-1].best < history[0].best
    last = [key for stage, key in fitness.calls if stage == 4]
    assert 4 < len(last) <= options.parents + 4 and tuple(levels) in last


@pytest.mark.parametrize("limit", [1, 20, 100])
def test_no_generation_begins_with_all_tokens_spent(limit: int) -> None:
    options = EvolutionOptions().limited(tokens=limit)
    _, history = Evolution(UNITS, BUDGET, start(), Quadratic(), options=options).run()
    spent = [step.tokens for step in history]
    assert spent[-1] >= limit
    assert len(spent) == 1 or spent[-2] < limit
    assert spent == sorted(spent)


def test_more_tokens_go_on_with_the_same_search(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    few, many = EvolutionOptions().limited(tokens=60), EvolutionOptions().limited(tokens=200)
    whole = Evolution(UNITS, BUDGET, start(), Quadratic(), options=many).run()
    Evolution(UNITS, BUDGET, start(), Quadratic(), options=few, checkpoint=path).run()
    fitness = Quadratic()
    resumed = Evolution(UNITS, BUDGET, start(), fitness, options=many, checkpoint=path, resume=True).run()
    assert resumed[1] == whole[1] and (resumed[0] == whole[0]).all()
    assert fitness.tokens < 200


@pytest.mark.parametrize("resample", [False, True])
def test_generations_race_on_tokens_of_their_own_when_resampled(resample: bool) -> None:
    fitness = Quadratic()
    options = replace(PLAIN, generations=3, token_shares=(0.5, 1.0), survivors=(0.5,), resample=resample)
    Evolution(UNITS, BUDGET, start(), fitness, options=options).run()
    per_generation = 16 + 8
    expected = [generation for generation in range(3) for _ in range(per_generation)] if resample else [0] * 72
    assert fitness.draws[2:] == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_seeds_give_equal_searches(seed: int) -> None:
    options = EvolutionOptions(generations=8)
    runs = [Evolution(UNITS, BUDGET, start(), Quadratic(), options=options, seed=seed).run() for _ in range(2)]
    assert (runs[0][0] == runs[1][0]).all()
    assert runs[0][1] == runs[1][1]


def test_a_resumed_search_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    whole = Evolution(UNITS, BUDGET, start(), Quadratic(), options=EvolutionOptions(generations=12), seed=5).run()
    path = tmp_path / "search.json"
    half = EvolutionOptions(generations=6)
    Evolution(UNITS, BUDGET, start(), Quadratic(), options=half, seed=5, checkpoint=path).run()
    fitness = Quadratic()
    options = EvolutionOptions(generations=12)
    resumed = Evolution(UNITS, BUDGET, start(), fitness, options=options, seed=5, checkpoint=path, resume=True).run()
    assert (resumed[0] == whole[0]).all()
    assert resumed[1] == whole[1]
    assert 0 < fitness.tokens < whole[1][-1].tokens


def test_a_checkpoint_with_an_older_name_of_a_constant_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    Evolution(UNITS, BUDGET, start(), Quadratic(), options=EvolutionOptions(generations=2), checkpoint=path).run()
    content = json.loads(path.read_text())
    content["identity"]["search option sensitivities"] = content["identity"].pop("search option patience")
    content["checksum"] = _checksum({key: value for key, value in content.items() if key != "checksum"})
    path.write_text(json.dumps(content))
    options = {"checkpoint": path, "resume": True}
    Evolution(UNITS, BUDGET, start(), Quadratic(), options=EvolutionOptions(generations=3), **options).run()
    with pytest.raises(MspError, match="search option patience"):
        other = EvolutionOptions(generations=3, patience=1)
        Evolution(UNITS, BUDGET, start(), Quadratic(), options=other, **options)


def test_a_killed_search_loses_at_most_a_generation(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path[:0] = {list(map(str, Path(__file__).parents[:2]))!r}
        from landscapes import UNITS, BUDGET, Quadratic, start
        from msp.engine.evolution import Evolution, EvolutionOptions
        from pathlib import Path
        class Dying(Quadratic):
            def loss(self, key, stage, draw):
                if self.tokens == 72:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().loss(key, stage, draw)
        options = EvolutionOptions(generations=9, emptied=0, patience=0)
        Evolution(UNITS, BUDGET, start(), Dying(), options=options, checkpoint=Path({str(path)!r})).run()
        """
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert json.loads(path.read_text())["generation"] == 3
    options = EvolutionOptions(generations=9, emptied=0, patience=0)
    resumed = Evolution(UNITS, BUDGET, start(), Quadratic(), options=options, checkpoint=path, resume=True).run()
    whole = Evolution(UNITS, BUDGET, start(), Quadratic(), options=options).run()
    assert (resumed[0] == whole[0]).all()


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    options = EvolutionOptions(generations=1)
    Evolution(
        UNITS, BUDGET, start(), Quadratic(), options=options, checkpoint=path, identity={"weights": "xxh3:1"}
    ).run()
    own = {"checkpoint": path, "resume": True, "options": options}
    for changed, message in (
        ({"identity": {"weights": "xxh3:2"}}, "another search: the weights differ; start anew"),
        ({"seed": 1}, "another search: seed 1, was 0; the weights differ; start anew"),
        ({"identity": {"weights": "xxh3:1"}, "seed": 1}, "another search: seed 1, was 0; start anew"),
        (
            {"identity": {"weights": "xxh3:1"}, "options": replace(options, emptied=3, tokens=9)},
            "another search: search option emptied 3, was 2; start anew",
        ),
    ):
        with pytest.raises(MspError, match=message):
            Evolution(UNITS, BUDGET, start(), Quadratic(), **{**own, **changed})
    identity = {"weights": "xxh3:1"}
    with pytest.raises(MspError, match=r"another search: budget \d+, was \d+; start anew"):
        Evolution(UNITS, Budget.for_units(UNITS, BUDGET.limit - 40), start(), Quadratic(), identity=identity, **own)
    with pytest.raises(MspError, match="another search: the first individuals differ; start anew"):
        Evolution(UNITS, BUDGET, [np.arange(len(UNITS)) % 4], Quadratic(), identity=identity, **own)
    # to search longer is the same search
    more = EvolutionOptions(generations=2)
    Evolution(UNITS, BUDGET, start(), Quadratic(), **{**own, "options": more}, identity=identity).run()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"identity": 3}'])
def test_a_broken_checkpoint_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "search.json"
    path.write_text(content)
    with pytest.raises(MspError, match="search"):
        Evolution(UNITS, BUDGET, start(), Quadratic(), checkpoint=path, resume=True)


def test_a_space_with_a_single_member_ends_the_search() -> None:
    units = UNITS[:1]
    levels, _ = Evolution(units, Budget.for_units(units, 5), [np.array([1])], lambda_fitness()).run()
    assert levels.tolist() == [1]


def lambda_fitness() -> Quadratic:
    class Flat(Quadratic):
        def loss(self, key: Key, stage: int, draw: int) -> float:
            return 0.0

    return Flat()


@pytest.mark.parametrize(
    "options",
    [
        {"offspring": 0},
        {"survivors": (0.0, 0.3)},
        {"survivors": (0.3,)},
        {"token_shares": (0.5, 0.25, 1.0)},
        {"token_shares": (0.1, 0.2, 0.5)},
        {"token_shares": ()},
        {"generations": -1},
        {"tokens": 0},
    ],
)
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        EvolutionOptions(**options)  # type: ignore[arg-type]


def test_crossover_takes_one_side_from_each_parent() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        child = crossover(np.zeros(9, dtype=np.int64), np.ones(9, dtype=np.int64), rng)
        cut = int((child == 0).sum())
        assert 0 < cut < 9
        assert (child[:cut] == 0).all() and (child[cut:] == 1).all()


def test_swaps_stay_in_range_and_leave_the_parent_alone() -> None:
    rng = np.random.default_rng(1)
    for level in (0, 2, 8):
        parent = np.full(len(UNITS), level)
        parent[0] = 1
        for _ in range(50):
            child = swap(parent, UNITS, 2, rng)
            assert ((child >= 0) & (child <= 8)).all()
            assert (parent[1:] == level).all()


def test_swaps_are_nearly_neutral_in_weight() -> None:
    rng = np.random.default_rng(2)
    parent = np.full(len(UNITS), 3)
    changes = [abs(kept_weights(swap(parent, UNITS, 1, rng), UNITS) - kept_weights(parent, UNITS)) for _ in range(100)]
    assert max(changes) <= 3 * 2 and any(changes)
