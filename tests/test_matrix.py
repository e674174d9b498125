"""What `make matrix` recorded is of the bounds that stand in pyproject.toml, and is what the documents tell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matrix
import pytest

RESULTS = json.loads(matrix.RESULTS.read_text(encoding="utf-8"))
RAN = {row["row"]: row for row in RESULTS["rows"] if row["passed"] is not None}


def padded(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit()]
    return (*parts, 0, 0)[:3]


def test_every_row_was_run_or_says_why_not() -> None:
    assert [row["row"] for row in RESULTS["rows"]] == [row.name for row in matrix.ROWS]
    for row in RESULTS["rows"]:
        assert row["passed"] or (row["passed"] is None and row["reason"].startswith("not run: no Python")), row


@pytest.mark.parametrize("name", matrix.bounds())
def test_the_lower_bound_is_what_was_run(name: str) -> None:
    found = RAN["oldest"]["versions"]
    assert padded(found[name]) == padded(matrix.bounds()[name])


def test_rows_of_one_old_package_hold_it_and_newer_ones() -> None:
    for name in ("torch", "transformers"):
        row = RAN[f"oldest {name}"]["versions"]
        assert padded(row[name]) == padded(matrix.bounds()[name])
        assert padded(row["numpy"]) > padded(matrix.bounds()["numpy"])


def test_the_document_has_the_table() -> None:
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    assert matrix.BEGIN + "\n" + matrix.table(RESULTS) + "\n" + matrix.END in text


def test_rows_ask_for_their_versions() -> None:
    rows = {row.name: matrix.requirements(row) for row in matrix.ROWS}
    low = matrix.bounds()
    assert all(rows["oldest"][name] == f"{name}=={low[name]}" for name in low)
    assert all(rows["newest"][name] == f"{name}>={low[name]}" for name in low)
    assert rows["oldest torch"]["torch"] == f"torch=={low['torch']}" and ">=" in rows["oldest torch"]["numpy"]


def test_interpreters_are_looked_for_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In PYTHONS, on PATH, and by commands that make them; one of another version does not serve."""
    own = "{}.{}".format(*sys.version_info)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / "matrix")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHONS", raising=False)
    assert matrix.find_python(own) is None and matrix.find_python("3.99") is None
    (tmp_path / "python3.99").symlink_to(sys.executable)
    assert matrix.find_python("3.99") is None
    monkeypatch.setenv("PYTHONS", sys.executable)
    assert matrix.find_python(own) == sys.executable and matrix.find_python("3.98") is None
    monkeypatch.delenv("PYTHONS")
    uv = tmp_path / "uv"
    uv.write_text(f"#!/bin/sh\n[ $2 = install ] || echo {sys.executable}\n")
    uv.chmod(0o755)
    assert matrix.find_python(own) == sys.executable
    uv.write_text("#!/bin/sh\nexit 1\n")
    conda = tmp_path / "conda"
    conda.write_text('#!/bin/sh\n[ $4 = --prefix ] && /bin/mkdir -p "$5/bin" && /bin/touch "$5/bin/python"\n')
    conda.chmod(0o755)
    assert matrix.find_python("3.97") == str(tmp_path / "matrix" / "python3.97" / "bin" / "python")
