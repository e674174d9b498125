"""Every test is run, once, and what several files share is made by one worker."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
import shares

TESTS = Path(__file__).resolve().parent
while TESTS.name != "tests":
    TESTS = TESTS.parent


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    folders = {part for file in TESTS.rglob("test_*.py") for part in file.relative_to(TESTS).parts[:-1]}
    assert folders
    for pattern in pytestconfig.getini("norecursedirs"):
        assert not [folder for folder in folders if fnmatch(folder, pattern)], pattern


def test_files_that_are_named_are_there() -> None:
    files = [file.stem for file in TESTS.rglob("test_*.py")]
    assert len(files) == len(set(files)), "two files of one name"
    named = [*shares.LONG, *(name for files in shares.TOGETHER.values() for name in files)]
    assert len(named) == len(set(named)) and set(named) <= {*files, *shares.TOGETHER}


def test_a_file_is_one_share_and_some_stay_together() -> None:
    one, other, elsewhere = (shares.share_of(f"tests/{test}") for test in ("a.py::b[x::y]", "a.py::c", "d/a.py::b"))
    assert one == other != elsewhere
    for name, files in shares.TOGETHER.items():
        assert {shares.share_of(f"tests/some/{file}.py::test") for file in files} == {name}


def test_what_takes_longest_comes_first() -> None:
    files = [shares.TOGETHER.get(name, [name])[0] for name in shares.LONG]
    nodeids = [f"tests/{file}.py::test" for file in (*files, "test_other")]
    assert sorted(reversed(nodeids), key=shares.place_of) == nodeids
    assert [shares.takes_long(nodeid) for nodeid in nodeids] == [True] * len(files) + [False]


def test_workers_use_every_core_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares.os, "sched_getaffinity", lambda _: set(range(6)))
    assert [shares.threads_of_a_worker(count) for count in (1, 2, 4, 6, 16)] == [6, 3, 1, 1, 1]
