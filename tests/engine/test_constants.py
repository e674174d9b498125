"""Constants of a search as a user gives them."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from families import SMALL

import msp
from msp import search
from msp.engine.constants import read_constants
from msp.engine.evolution import EvolutionOptions
from msp.errors import UsageError


def test_a_text_names_fields() -> None:
    given = "crossover_rate: 0, survivors: [0.5, 1], patience: 0, emptied: 3"
    expected = {"crossover_rate": 0, "survivors": (0.5, 1), "patience": 0, "emptied": 3}
    assert read_constants(given) == read_constants(expected) == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("crossover: 0", "unknown search option 'crossover'; known: generations"),
        ("emptied: many", "emptied: 'many' is not like 2"),
        ("emptied: true", "emptied: True is not like 2"),
        ("resample: 1", "resample: 1 is not like False"),
        ("survivors: [a, b]", "survivors"),
        ("survivors: [0.5]", "are not 2 shares"),
        ("population: 0", "at least 1"),
        ("tokens: 7", "unknown"),
        ("emptied", "emptied: None is not like 2"),
        ("emptied: {", "no recipe"),
        ("missing.yaml", "no recipe"),
    ],
)
def test_what_cannot_be_is_named(given: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        read_constants(given)


def test_a_recipe_says_how_to_search_as_it_did(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"sparsity": 0.7, "calibration": text, "evaluations": 32, **SMALL}
    changed = {"patience": 0, "emptied": 0, "parents": 3, "survivors": [0.5, 0.5]}
    first = search(llama, output=tmp_path / "found", search_options=changed, **options)
    recorded = first.recipe["search"]
    assert {name: recorded[name] for name in changed} == changed | {"survivors": (0.5, 0.5)}
    again = search(llama, search_options=tmp_path / "found" / "recipe.yaml", **options)
    assert again.history == first.history and again.allocation == first.allocation
    assert first.history != search(llama, **options).history


def test_an_older_recipe_has_older_names(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("made_by:\n  search:\n    sensitivities: 1\n    parents: 3\n")
    assert read_constants(tmp_path / "recipe.yaml") == {"patience": 1, "parents": 3}
    with pytest.raises(UsageError, match="unknown search option 'sensitivities'"):
        read_constants("sensitivities: 1")


def test_tokens_that_ended_a_search_leave_no_endless_one(llama: Path, text: Path, tmp_path: Path) -> None:
    search(llama, output=tmp_path, sparsity=0.7, calibration=text, search_tokens=1000, **SMALL)
    expected = {
        name: value for name, value in asdict(EvolutionOptions()).items() if name not in ("tokens", "generations")
    }
    assert read_constants(tmp_path / "recipe.yaml") == expected


def test_what_only_chooses_does_not_begin_to_search(llama: Path, text: Path) -> None:
    options = {"sparsity": 0.7, "calibration": text, "allocator": "ramp-best", **SMALL}
    found = msp.prune(llama, search_options="generations: 5", **options)
    assert found.history == msp.prune(llama, **options).history and len(found.history) == 1
