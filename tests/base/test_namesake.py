"""Another project's distribution ``msp`` beside this one is told of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msp.base.namesake import namesake


def distribution(folder: Path, summary: str) -> None:
    about = folder / "msp-2023.10.6.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: msp\nVersion: 2023.10.6\nSummary: {summary}\n")


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=paths[0], timeout=300
    )


def test_importing_tells_of_the_other_project(tmp_path: Path) -> None:
    distribution(tmp_path, "MSP SDK")
    root = Path(__file__).parents[2]
    told = python("import msp", tmp_path, root).stderr
    assert "'msp' 2023.10.6 (MSP SDK)" in told and "pip install --force-reinstall mixed-sparsity-pruning" in told


def test_a_checkout_of_before_the_name_is_no_other_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "Mixed sparsity pruning: N:M sparse language models")
    assert namesake() is None


def test_the_command_says_who_overwrote_its_package(tmp_path: Path) -> None:
    """As pip leaves it where the other project was installed last: its ``__init__.py``, our other files."""
    distribution(tmp_path, "MSP SDK")
    package = tmp_path / "msp"
    package.mkdir()
    root = Path(__file__).parents[2] / "msp"
    for file in root.iterdir():
        if file.name != "__init__.py":
            (package / file.name).symlink_to(file)
    (package / "__init__.py").write_text("")
    done = python("import msp.cli", tmp_path)
    assert done.returncode == 1 and "another project" in done.stderr and "Traceback" not in done.stderr
