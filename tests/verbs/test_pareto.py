"""Several budgets in one run."""

import json
import tempfile
from pathlib import Path

import pytest
from families import SMALL, build
from PIL import Image

import msp
from msp.allocators import uniform
from msp.errors import UsageError
from msp.formats.patterns import Allocation
from msp.models.structure import find_structure
from msp.session import opened
from msp.session.workbench import Workbench


def test_every_budget_is_searched_for_on_shared_evidence(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, ranked = [], []
    load, ranks = opened.load_model, Workbench.dense_ranks
    monkeypatch.setattr(opened, "load_model", lambda *a, **k: loaded.append(1) or load(*a, **k))
    monkeypatch.setattr(Workbench, "dense_ranks", lambda *a: ranked.append(1) or ranks(*a))
    options = {"calibration": text, "evaluations": 32, **SMALL}
    curve = msp.pareto(llama, sparsities=[0.75, "0.5", 0.6], output=tmp_path, work_dir=tmp_path / "work", **options)
    assert len(loaded) == len(ranked) == 1
    assert list(curve.results) == ["0.5", "0.6", "0.75"]
    shapes = {linear.name: linear.shape for linear in find_structure(build("llama")).linears}
    total = sum(rows * columns for rows, columns in shapes.values())
    for name, result in curve.results.items():
        assert Allocation.load(tmp_path / name / "allocation.json") == result.allocation
        assert (tmp_path / name / "recipe.yaml").exists()
        assert result.allocation.kept(shapes) == result.kept <= result.budget == int((1 - float(name)) * total + 1e-6)
        assert result.recipe["sparsity"] == float(name)
    # The loosest search has nothing before it, and is the one that a single budget gets.
    alone = msp.search(llama, sparsity=0.5, **options)
    assert curve.results["0.5"].allocation == alone.allocation and curve.results["0.5"].history == alone.history
    written = json.loads((tmp_path / "pareto.json").read_text())
    assert written["fitness"] == "kl"
    for point, (name, result) in zip(written["points"], curve.results.items(), strict=True):
        assert point["name"] == name and point["density"] == result.kept / total
        assert point["loss"] == result.loss == result.history[-1]["best"]
    losses = [point["loss"] for point in written["points"]]
    assert losses == sorted(losses)
    # What packing gives.
    pruned = msp.prune(llama, allocation=tmp_path / "0.6" / "recipe.yaml", calibration=text, **SMALL)
    assert written["points"][1]["bytes"] == pruned.bytes["packed"] and written["dense_bytes"] == pruned.bytes["dense"]
    with Image.open(tmp_path / "pareto.png") as picture:
        assert min(picture.size) > 300
    resumed = msp.pareto(llama, sparsities=[0.5, 0.6, 0.75], work_dir=tmp_path / "work", resume=True, **options)
    assert resumed.to_json() == curve.to_json()


def test_no_temporary_file_of_the_picture_has_a_name(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill would leave it there."""
    make = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, dir=None, **k: make(*a, dir=dir, **k) if dir else pytest.fail())
    options = {"calibration": text, "evaluations": 16, **SMALL}
    msp.pareto(llama, sparsities=[0.75, 0.5], output=tmp_path / "out", **options)
    assert (tmp_path / "out" / "pareto.png").exists()


def test_a_search_starts_from_the_result_before_it(llama: Path, text: str) -> None:
    """Its densities, scaled: where nothing is searched further, the first population holds it."""
    seen = []

    class Watched(uniform.Uniform):
        def allocate(self, problem):
            seen.append(problem)
            return problem.from_densities([2.0 if unit.block == 0 else 0.5 for unit in problem.units])

    from msp.allocators import base

    base.ALLOCATORS.factories["watched"] = Watched
    try:
        curve = msp.pareto(llama, sparsities=[0.6, 0.7], allocator="watched", calibration=text, **SMALL)
    finally:
        del base.ALLOCATORS.factories["watched"]
    assert not seen[0].hints and len(seen[1].hints) == 1
    (hint,) = seen[1].hints
    assert seen[1].budget.is_met(seen[1].cost(hint))
    # With levels that come in eighths, the scaled result is what the same rule gives within a level.
    found = seen[1].from_densities([2.0 if unit.block == 0 else 0.5 for unit in seen[1].units]).levels
    assert abs(hint - found).max() <= 1
    # The allocator measured nothing, the curve did.
    losses = [result.loss for result in curve.results.values()]
    assert all(loss is not None and loss > 0 for loss in losses) and losses[0] < losses[1]


def test_budgets_in_bytes_are_named_as_they_were_written(llama: Path, text: str, tmp_path: Path) -> None:
    options = {"calibration": text, "allocator": "uniform", "fitness": "perplexity", **SMALL}
    curve = msp.pareto(llama, budgets_bytes=["45 kB", "0.05MB"], output=tmp_path, **options)
    assert list(curve.results) == ["0.05MB", "45kB"]
    assert [point["bytes"] for point in curve.to_json()["points"]] == [r.spent for r in curve.results.values()]
    assert (tmp_path / "45kB" / "allocation.json").exists() and (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of them"),
        ({"sparsities": [0.5], "budgets_bytes": ["1MB"]}, "one of them"),
        ({"sparsities": [0.5, "0.50"]}, "more than once"),
        ({"budgets_bytes": ["1MB", "1000kB"]}, "more than once"),
        ({"budgets_decode": ["1ms", "soon"]}, "12ms or 800us"),
        ({"sparsities": [0.5, 1.5]}, "outside"),
        ({"sparsities": [0.5, 0.6], "allocator": "best"}, "allocator .best. is not one of"),
        ({"sparsities": [0.5, 0.6], "resume": True}, "work_dir"),
    ],
)
def test_wrong_requests_are_refused_before_the_model_is_loaded(options: dict, message: str, monkeypatch) -> None:
    monkeypatch.setattr(opened, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=message):
        msp.pareto("anything", **options)
