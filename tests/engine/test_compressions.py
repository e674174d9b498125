"""A compression that msp does not know goes through budget, search, resume, workers and streaming unchanged.

It is the example of CONTRIBUTING.md, which scales the outputs of linears by 0, 1/2 or 1.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import example, load
from families import build, save, tokens

from msp.allocators import Problem, get_allocator
from msp.compressions.base import Compression, units_of
from msp.engine.candidates import CandidateModel, LocalRunner
from msp.engine.distributed import Workers
from msp.engine.evolution import Evolution, EvolutionOptions
from msp.engine.fitness import Job, Key, TokenFitness
from msp.engine.runners import Setting, open_runner
from msp.engine.state import Step
from msp.engine.streaming import StreamingRunner
from msp.errors import MspError, UsageError
from msp.evidence.evaluate import DenseReference
from msp.models.gates import GatedModel
from msp.models.loading import load_model
from msp.models.stored import load_stored
from msp.models.structure import Structure, find_structure
from msp.plan.budget import Budget, Level, Unit
from msp.plan.levels import Levels, cost, kept_weights

BATCHES = 12
OPTIONS = EvolutionOptions(generations=6, population=4, parents=3, offspring=6, patience=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: with another number of threads a sum may end on another last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Structure], Compression]:
    return load("scaling_example", example("compression"), tmp_path_factory.mktemp("scaling")).Scaling


def make_setting(make: Callable[[Structure], Compression], unit: str = "linear") -> Setting:
    model = build("qwen2", seed=3)
    structure = find_structure(model)
    compression = make(structure)
    reference = DenseReference(model, tokens(2 * BATCHES, 17, seed=4), batch_size=2)
    return Setting(model, structure, compression, units_of(structure, compression, unit=unit), reference)


def half(units: Sequence[Unit]) -> Budget:
    return Budget.for_units(units, sum(unit.costs[-1] for unit in units) // 2)


class Interrupted(Exception):
    """Ends a search in the middle of a generation."""


@contextmanager
def fitness_of(setting: Setting, workers: Workers | None, calls: int | None) -> Iterator[Any]:
    with open_runner(setting, workers) as runner:
        fitness = TokenFitness(runner)

        class Ending:
            stages = fitness.stages
            left = calls

            @property
            def tokens(self) -> int:
                return fitness.tokens

            def __call__(self, candidates: Sequence[Key], stage: int, draw: int = 0) -> list[float]:
                if self.left is not None:
                    if not self.left:
                        raise Interrupted
                    self.left -= 1
                return fitness(candidates, stage, draw)

        yield Ending()


def search(
    setting: Setting, *, workers: Workers | None = None, calls: int | None = None, **checkpoint: Any
) -> tuple[list[int], list[Step]]:
    """The levels and the history of a search, which ends after ``calls`` of the fitness."""
    units = setting.units
    with fitness_of(setting, workers, calls) as fitness:
        first = [np.array([unit.top for unit in units]), np.ones(len(units), dtype=np.int64)]
        identity = setting.compression.identity
        options: dict[str, Any] = {"options": OPTIONS, "seed": 5, "identity": identity, **checkpoint}
        levels, history = Evolution(units, half(units), first, fitness, **options).run()
    return levels.tolist(), history


@pytest.mark.parametrize("unit", ["linear", "block"])
def test_levels_meet_the_budget(make: Any, unit: str) -> None:
    units = make_setting(make, unit).units
    assert [[str(level.size) for level in each.levels] for each in units] == [["0", "1/2", "1"]] * len(units)
    weights = sum(each.weights for each in units)
    for share in (Fraction(1, 2), Fraction(1, 4), Fraction(3, 4)) if unit == "linear" else (Fraction(1, 2),):
        budget = Budget.for_units(units, int(share * weights))
        problem = Problem(tuple(units), budget, evidence=None)  # type: ignore[arg-type]  # neither asks for any
        assert problem.density == pytest.approx(float(share))
        for name in ("uniform", "ramp"):
            levels: Levels = get_allocator(name).allocate(problem).levels
            assert cost(levels, units) == kept_weights(levels, units) == budget.limit == int(share * weights)


def test_a_search_finds_levels_and_the_settled_model_has_their_loss(make: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    setting = make_setting(make)
    before = dict(setting.model.named_modules())
    levels, history = search(setting)
    budget = half(setting.units)
    assert budget.is_met(cost(np.array(levels), setting.units))
    assert history[-1].generation == OPTIONS.generations and history[-1].best < history[0].mean
    settled = [setting.compression.settle(unit, level) for unit, level in zip(setting.units, levels, strict=True)]
    modules = {name: module for each in settled for name, module in each.items()}
    with setting.structure.replaced(modules):
        kl = setting.reference.total(setting.model).divergence / (2 * BATCHES * 16)
    assert kl == pytest.approx(history[-1].best, rel=1e-5)
    assert dict(setting.model.named_modules()) == before


def test_an_interrupted_search_goes_on_to_the_same_bits(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    setting = make_setting(make)
    path = tmp_path / "search.json"
    with pytest.raises(Interrupted):
        search(setting, calls=9, checkpoint=path)
    assert 0 < json.loads(path.read_text())["generation"] < OPTIONS.generations
    assert search(setting, checkpoint=path, resume=True) == search(setting)
    monkeypatch.setattr(make, "identity", {"compression": "another"})
    with pytest.raises(MspError, match="compression another, was scaling"):
        search(setting, checkpoint=path, resume=True)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_two_workers_find_the_same(make: Any) -> None:
    setting = make_setting(make)
    assert search(setting, workers=Workers(2)) == search(setting)


def test_a_streamed_model_measures_the_same(make: Any, tmp_path: Path) -> None:
    save("qwen2", tmp_path)
    model = load_model(tmp_path).model
    structure = find_structure(model)
    units = units_of(structure, make(structure))
    reference = DenseReference(model, tokens(4, 9, seed=6), batch_size=2)
    jobs = [Job(tuple(random.randint(0, 2) for _ in units), (0, 1)) for _ in range(5)]
    with CandidateModel(model, structure, make(structure), units) as candidates:
        expected = LocalRunner(candidates, reference, structure).run(jobs)
    loaded, stored = load_stored(tmp_path, device=torch.device("cpu"))
    gates = GatedModel(loaded.model, stored)
    assert StreamingRunner(gates, make(stored), units, reference, hidden_bytes=2**20).run(jobs) == expected


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ([(4, "1/2"), (4, "1")], "level b must cost more and keep no less than a"),
        ([(4, "1/2"), (8, "1/4")], "level b must cost more and keep no less than a"),
        ([(4, "1/2"), (8, "3/2")], "level b has size 3/2, outside"),
    ],
)
def test_levels_that_do_not_rise_are_refused(levels: list[tuple[int, str]], told: str) -> None:
    made = tuple(Level(price, Fraction(size), label) for (price, size), label in zip(levels, "ab", strict=True))
    with pytest.raises(UsageError, match=f"u: {told}"):
        Unit("u", ("u",), 16, 0, "k", made)


def test_a_module_outside_the_blocks_is_refused() -> None:
    structure = find_structure(build("llama"))
    outside = {"lm_head": torch.nn.Identity()}
    with pytest.raises(MspError, match="lm_head is in none of the 2 blocks"), structure.replaced(outside):
        pass


def test_units_are_linears_or_blocks(make: Any) -> None:
    structure = find_structure(build("llama"))
    with pytest.raises(UsageError, match="unit 'model' is not one of linear, block"):
        units_of(structure, make(structure), unit="model")
