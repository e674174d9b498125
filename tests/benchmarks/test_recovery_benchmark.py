"""The recovery benchmark: its cells, and what it says of their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recovery
from recovery import RECOVERIES, SETTING, Cell, cells, read, run, table

from msp.allocators import get_allocator
from msp.pruners import get_pruner
from msp.recovery import get_recovery
from msp.session.arguments import PruneArguments
from msp.session.declarations import defaults
from msp.session.recover_arguments import RecoverArguments


def write(folder: Path, cell: Cell, before: float, after: float, **changes: Any) -> None:
    """A file as a run leaves it."""
    row = {
        "setting": cell.setting,
        "before": {"kl": before, "perplexity": 200.0},
        "after": {"kl": after, "perplexity": 100.0},
        "parameters": 1_331_904,
        "seconds": 600.4,
        "peak_memory": 2_000_000_000,
    }
    (folder / f"{cell.name}.json").write_text(json.dumps(row | changes))


def test_cells_can_be_measured() -> None:
    every = cells()
    assert len({cell.name for cell in every}) == len(every)
    for cell in every:
        get_pruner(cell.pruner), get_allocator(cell.allocator)
        for method in cell.method.split("+"):
            get_recovery(method)
    assert SETTING.keys() <= {*defaults(PruneArguments), *defaults(RecoverArguments)}
    assert {cell.method for cell in every} == {method for method, _ in RECOVERIES}
    assert Cell(tokens=1_000_000).epochs == 1 and Cell(tokens=3_000_000).epochs == 3


def test_a_file_with_another_setting_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell()
    assert read(cell, tmp_path) is None
    write(tmp_path, cell, 0.5, 0.2)
    assert read(cell, tmp_path) is not None
    monkeypatch.setitem(SETTING, "window", 128)
    assert read(cell, tmp_path) is None


def test_the_table_has_means_over_seeds(tmp_path: Path) -> None:
    cell = Cell(tokens=500_000)
    write(tmp_path, cell, 0.5, 0.2)
    write(tmp_path, replace(cell, seed=1), 0.6, 0.25)
    lines = table(tmp_path).splitlines()
    assert len(lines) == 3
    figures = [each.strip() for each in lines[2][1:-1].split("|")]
    assert figures == [
        *("0.25", "sparsegpt", "fisher-rank", "distil", "500,000", "2"),
        *("0.550", "0.225", "100.0", "1,331,904", "600", "2000"),
    ]


def test_a_cell_that_fails_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(recovery, "__file__", str(tmp_path / "absent.py"))
    assert run([Cell()], tmp_path, tmp_path) == 1
    assert "[1/1] wiki6m-sparsegpt-0.25-fisher-rank-seed0-distil-1000000: exit code 2" in capfd.readouterr().out
