"""The quality benchmark: its cells, what it says of their files, and a run that is cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import quality
import quality_tables
import torch
from quality_cells import (
    ALLOCATORS,
    REFERENCES,
    ROOT,
    SEARCHES,
    SHARED,
    TABLES,
    VARIANTS,
    Cell,
    CpuClock,
    cells_of,
    quantised,
    read,
)
from quality_tables import NOTHING, Results

from msp.allocators import get_allocator
from msp.engine.evolution import EvolutionOptions
from msp.session.arguments import PruneArguments
from msp.session.declarations import defaults

GROUP = Cell()


def write(folder: Path, cell: Cell, kl: float, *, history: list[tuple[int, float]] = (), **changes: Any) -> None:
    """A file as a run leaves it."""
    steps = [{"tokens": tokens, "best": best} for tokens, best in history]
    row = {
        "commit": "abc",
        "machine": {"processor": "Some CPU", "isa": "some"},
        "setting": cell.setting(),
        "kl": kl,
        "perplexity": 100 * kl,
        "bytes": 4_000_000,
        "seconds": {"Search": 50.0, "Dense test predictions": 1.0, "Evaluating": 1.5},
        "tokens": steps[-1]["tokens"] if steps else 0,
        "history": steps,
    }
    (folder / f"{cell.name}.json").write_text(json.dumps(row | changes))


def cells(table: str, *starts: str) -> list[str]:
    """The cells of the one line of a table that starts with ``starts``."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if "|" in line]
    (line,) = [line for line in lines if line[: len(starts)] == list(starts)]
    return line[len(starts) :]


def claims(folder: Path) -> str:
    told = quality_tables.quality_page(Results(folder))
    return told[told.index("What is claimed") : told.index("### stories260k")]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """One group, two seeds: ours needs 1000 and 3000 tokens for what its rivals end at after 10,000."""
    for seed in (0, 1):
        for index, name in enumerate(ALLOCATORS):
            cell = replace(GROUP, seed=seed, allocator=name)
            if name == "msp":
                write(tmp_path, cell, 0.7 + seed / 10, history=[(500, 0.9), (1000 + 2000 * seed, 0.5), (10_000, 0.4)])
            else:
                write(tmp_path, cell, 1.0 + index / 10, history=[(500, 0.8), (10_000, 0.5)] if name in SEARCHES else ())
    return tmp_path


def test_every_cell_has_a_file_of_its_own() -> None:
    everything = {cell for table in TABLES for cell in cells_of(table)}
    assert len({cell.name for cell in everything}) == len(everything)


def test_every_group_is_measured_with_every_allocator_and_as_many_tokens() -> None:
    pruned = [cell for cell in cells_of("quality") if cell.allocator not in REFERENCES]
    groups = list(dict.fromkeys(replace(cell, allocator="") for cell in pruned))
    assert len(pruned) == len(ALLOCATORS) * len(groups)
    searches = {cell.setting()["search_tokens"] for cell in pruned if cell.allocator in SEARCHES}
    assert len(searches) == 1 and not {c.setting()["search_tokens"] for c in pruned if c.allocator not in SEARCHES} - {
        None
    }


def test_the_variants_change_what_there_is() -> None:
    known = {field.name for field in fields(EvolutionOptions)}
    for name, changed in VARIANTS.items():
        options = dict(changed)
        for allocator in options.pop("seeds", ()):
            get_allocator(allocator)
        assert options.pop("hidden_bytes", 0) != defaults(PruneArguments)["hidden_bytes"]
        assert options.keys() <= known, name
        assert not options or replace(EvolutionOptions(), **options) != EvolutionOptions(), name


def test_what_is_measured_with_another_setting_is_missing(tmp_path: Path) -> None:
    search, free = Cell(), Cell(allocator="uniform")
    for cell in (search, free):
        write(tmp_path, cell, 1.0)
    assert not quality.missing([search, free, search], tmp_path)
    assert quality.missing([search, free, replace(free, seed=1)], tmp_path, 5) == [search, replace(free, seed=1)]
    assert read(search, tmp_path) is not None and read(search, tmp_path, 5) is None


def test_the_claims_are_checked_on_what_the_files_say(measured: Path) -> None:
    # 0.75 on average against 1.0 of uniform; 1000 and 3000 of 10,000 tokens
    told = claims(measured)
    assert cells(told, "Wanda", "25%") == ["yes, by 25%", "yes: 25.0% below uniform", "yes: 20%", "yes: 20%"]
    assert cells(told, "Wanda", "50%") == [NOTHING] * 4

    write(measured, replace(GROUP, allocator="owl"), 0.5)
    write(measured, replace(GROUP, allocator="owl", seed=1), 0.85)
    slow = replace(GROUP, allocator="msp", seed=1)
    write(measured, slow, 0.8, history=[(500, 0.9), (7000, 0.5)])
    assert cells(claims(measured), "Wanda", "25%") == ["no: owl", "no: 11.1% above owl", "no: 40%", "yes: 40%"]
    write(measured, slow, 0.8, history=[(500, 0.9), (7000, 0.51)])
    assert cells(claims(measured), "Wanda", "25%")[2:] == ["no: not reached with 1 of 2 seeds"] * 2


def test_claims_compare_the_seeds_that_all_have(measured: Path) -> None:
    write(measured, replace(GROUP, allocator="uniform", seed=2), 0.1)
    assert cells(claims(measured), "Wanda", "25%")[0] == "yes, by 25%"
    # the tables show all there is: 1.0, 1.0 and 0.1
    told = quality_tables.quality_page(Results(measured))
    assert cells(told[: told.index("Perplexity:")], "Wanda", "25%", "4.00 MB")[0] == "**0.700 ± 0.520**"


def test_the_tables_say_what_is_missing(measured: Path) -> None:
    results = Results(measured)
    told = quality_tables.readme_table(results)
    assert cells(told, "msp") == ["4.00", "**0.750 ± 0.071**", "**75.0 ± 7.1**", NOTHING, NOTHING]
    assert cells(told, "*int4*")[1:3] == [NOTHING, NOTHING]
    assert "2 seeds" in told
    write(measured, Cell(allocator="int4"), 0.0321, bytes=3_210_000, perplexity=88.04)
    assert cells(quality_tables.readme_table(results), "*int4*") == ["3.21", "0.0321", "88.0", "", ""]
    assert cells(quality_tables.pattern_table(results), "linear", "8")[-1] == "0.750 ± 0.071"
    assert cells(quality_tables.pattern_table(results), "block", "16")[-1] == NOTHING


def test_the_ablation_compares_the_same_seeds(measured: Path) -> None:
    write(
        measured,
        Cell(variant="crossover", seed=1),
        1.0,
        seconds={"Search": 200.0, "Dense test predictions": 2.0, "Evaluating": 3.0},
    )
    told = quality_tables.ablation_table(Results(measured))
    assert cells(told, "crossover") == ["1.000", "+25.0%", "40.0", "2.00 x"]
    assert cells(told, "no racing")[1] == NOTHING


def test_the_picture_is_drawn_of_what_there_is(measured: Path, tmp_path: Path) -> None:
    write(measured, Cell(allocator="int8"), 0.001)
    quality_tables.picture(Results(measured), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 64), (4, 48)])
def test_quantisation_rounds_to_the_nearest_level(bits: int, group: int | None) -> None:
    generator = torch.Generator().manual_seed(bits + (group or 0))
    weight = torch.randn(5, 96, generator=generator, dtype=torch.float64).float()
    values, size = quantised(weight, bits, group, torch.float16)
    width, top = group or 96, 2 ** (bits - 1) - 1
    scales = 0
    for row in range(5):
        for start in range(0, 96, width):
            part = weight[row, start : start + width].tolist()
            scale = float(torch.tensor(max(map(abs, part)) / top).half())
            levels = [Fraction(scale) * step for step in range(-top - 1, top + 1)]
            for value, got in zip(part, values[row, start : start + width].tolist(), strict=True):
                nearest = min(levels, key=lambda level: abs(level - Fraction(value)))
                assert abs(got - float(nearest)) < 1e-6
            scales += 1
    assert size == 5 * 96 * bits // 8 + 2 * scales


def test_the_clock_goes_on_where_an_interrupted_search_stopped(tmp_path: Path) -> None:
    (tmp_path / "spent").write_text("1000.0")
    clock = CpuClock(tmp_path / "spent")
    with clock.stage("Search") as advance:
        sum(range(10**5))
        advance(1)
    with clock.stage("Pruning"):
        pass
    assert 1000 < float((tmp_path / "spent").read_text()) <= clock.seconds["Search"] < 1100
    assert clock.seconds["Pruning"] < 100


@pytest.mark.skipif(not (SHARED / "models/stories260k").exists(), reason="stories260k is not in ../shared")
def test_cells_are_measured_and_not_twice(tmp_path: Path) -> None:
    """Real cells in processes of their own: a reference, a search, and a search that may go on."""
    command = [sys.executable, str(Path(quality.__file__)), "--jobs", "1", "--results", str(tmp_path / "results")]
    command += ["--work", str(tmp_path / "work"), "--only", "^stories260k-(int8|wanda-0.25-m8-linear-seed0-msp)$"]

    def run(tokens: int) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--search-tokens", str(tokens)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert len(run(120_000).splitlines()) == 2
    results = tmp_path / "results"
    searched = Cell(model="stories260k")
    first = read(searched, results, 120_000)
    int8 = read(Cell(model="stories260k", allocator="int8"), results, 120_000)
    assert first is not None and int8 is not None
    assert 0 < int8["kl"] < 0.01 < first["kl"] and first["bytes"] < int8["bytes"] * 2
    assert run(120_000) == ""
    assert len(run(200_000).splitlines()) == 1
    second = read(searched, results, 200_000)
    assert second is not None and second["history"][: len(first["history"])] == first["history"]
    assert second["tokens"] >= 200_000 > first["tokens"] >= 120_000
    assert second["seconds"]["Search"] > first["seconds"]["Search"] > 0
