"""The options of the functions and of the command line are one declaration, parsed once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer.main
from families import save

import msp
from msp.allocators.base import Allocated, Problem
from msp.cli import app
from msp.errors import UsageError
from msp.pruners import KeepingPruner, Scoring
from msp.session import arguments
from msp.session.arguments import PruneArguments
from msp.session.declarations import defaults
from msp.session.options import Options

VERBS = {
    "prune": arguments.PruneArguments,
    "search": arguments.SearchArguments,
    "compare": arguments.CompareArguments,
    "sensitivity": arguments.SensitivityArguments,
    "evaluate": arguments.EvaluateArguments,
    "generate": arguments.GenerateArguments,
    "measure": arguments.MeasureArguments,
    "info": arguments.InfoArguments,
}
SMALL = {"window": 16, "calibration_tokens": 64, "fitness_tokens": 64, "test_tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    save("llama", folder / "dense")
    (folder / "text.txt").write_text(" ".join(f"w{number * 7 % 60}" for number in range(2000)))
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_function_and_command_have_the_declared_options(verb: str) -> None:
    declared = defaults(VERBS[verb])
    signature = inspect.signature(getattr(msp, verb)).parameters
    command = typer.main.get_command(app).commands[verb]
    flags = {name: flag for flag in command.params for name in flag.opts}
    for name, default in declared.items():
        assert signature[name].default == default
        assert flags[f"--{name.replace('_', '-')}"].default == default, name
        assert f"    {name}: " in getattr(msp, verb).__doc__
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())


def test_pareto_takes_the_options_of_search_but_for_one_budget() -> None:
    own = {"sparsity", "budget_bytes", "budget_decode", "work_dir"}
    assert defaults(arguments.ParetoArguments).keys() == defaults(arguments.SearchArguments).keys() - own


def test_no_default_is_written_twice() -> None:
    """A parsed run without options has the declared defaults."""
    options = Options.parse(sparsity=0.5, calibration=__file__)
    for name in ("unit", "seed", "fitness", "fitness_noise", "window", "calibration_tokens", "test_tokens", "dtype"):
        assert getattr(options, name) == defaults(PruneArguments)[name]
    assert (options.allocator.name, options.pruner.name) == ("msp", "wanda")


@pytest.mark.parametrize(
    "verb", [msp.prune, msp.search, msp.compare, msp.sensitivity, msp.evaluate, msp.measure, msp.info]
)
def test_an_unknown_option_is_named(verb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"allocators": ["uniform"]} if verb is msp.compare else {}
    with pytest.raises(UsageError, match="unknown option 'trust_remote_cod': did you mean trust_remote_code"):
        verb("nowhere", **needed, trust_remote_cod=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sparsity": 2}, "outside"),
        ({"sparsity": 0.5, "device": "abacus"}, "abacus"),
        ({"sparsity": 0.5, "dtype": "int4"}, "int4"),
        ({"sparsity": 0.5, "seed": -1}, "seed -1"),
        ({"sparsity": 0.5, "hidden_bytes": "much"}, "not a number of bytes"),
        ({"sparsity": 0.5, "pruner": KeepingPruner}, "KeepingPruner is a class"),
        ({"sparsity": 0.5, "allocator": object()}, "cannot serve as allocator: it has no name, allocate"),
    ],
)
def test_what_the_command_line_checks_early_functions_check_early(option: dict[str, Any], message: str) -> None:
    for verb in (msp.prune, msp.search, msp.dry_run):
        with pytest.raises(UsageError, match=message):
            verb("there is no such model", **option)


@dataclass(frozen=True)
class Last(KeepingPruner):
    """Keep the last weights of every group."""

    name: ClassVar[str] = "last"

    def scoring(self, weight: Any, statistics: Any) -> Scoring:
        return Scoring(column_scale=weight.new_ones(weight.shape[1], dtype=weight.float().dtype).cumsum(0))


@dataclass(frozen=True)
class Even:
    """One density for all."""

    name: ClassVar[str] = "even"

    def allocate(self, problem: Problem) -> Allocated:
        return problem.from_densities([1.0] * len(problem.units))


def test_objects_serve_without_registration(folder: Path) -> None:
    asked: dict[str, Any] = {"sparsity": 0.5, "calibration": str(folder / "text.txt"), "device": "cpu", **SMALL}
    with pytest.warns(UserWarning, match="'even' gives every unit the level that uniform gives"):
        result = msp.prune(folder / "dense", pruner=Last(), allocator=Even(), **asked)
    assert (result.recipe["pruner"], result.recipe["allocator"]) == ("last", "even")
    rows = msp.compare(folder / "dense", allocators=["uniform"], pruners=[Last(), "magnitude"], seeds=[0], **asked).rows
    assert [row.pruner for row in rows if row.seed == 0] == ["last", "magnitude"]


def test_results_have_a_repr_worth_reading(folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"calibration": str(folder / "text.txt"), "device": "cpu", "allocator": "uniform", **SMALL}
    result = msp.prune(folder / "dense", sparsity=0.5, output=tmp_path / "out", **asked)
    without = {name: value for name, value in asked.items() if name != "allocator"}
    told = [
        result,
        msp.search(folder / "dense", sparsity=0.5, **asked),
        msp.pareto(folder / "dense", sparsities=[0.5, 0.75], **asked),
        msp.compare(folder / "dense", sparsity=0.5, allocators=["uniform"], seeds=[0], **without),
        msp.info(folder / "dense"),
        msp.info(tmp_path / "out"),
        msp.evaluate(tmp_path / "out", evaluate=str(folder / "text.txt"), window=16, device="cpu"),
        msp.dry_run(folder / "dense", sparsity=0.5, **asked),
    ]
    for each in told:
        assert len(repr(each)) < 400, each
        assert repr(each).startswith(f"{type(each).__name__}(")
    assert "keeps 50.00% of" in repr(result) and "KL" in repr(result)
    table = msp.measure(folder / "dense", patterns="2:8", device="cpu")
    assert repr(table).startswith("DecodeTable(float32: ") and repr(table).endswith("in 2 storages each)")
