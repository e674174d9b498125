"""Runs msp on the oldest and newest versions that pyproject.toml allows: ``make matrix``.

Each row has a virtual environment in ``build/matrix``, which the next run uses again. It gets msp from a wheel of HEAD
without CUDA; one wheel serves all versions of torch, since the compiled module does not link to it. A row compares the
golden results (``tests/golden_results.py``), runs ``TESTS``, and decodes with the models that all rows packed.
``benchmarks/results/matrix.json`` and the table in ``docs/reliability.md`` hold the results.

A Python is searched in ``$PYTHONS`` (paths, with spaces between), on PATH, and by ``uv`` and ``conda``, if these
commands exist. pip's own settings (``PIP_...``) name the source of packages.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; mypy and pytest bring it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- make matrix writes this table -->\n", "<!-- end of the table -->\n"
TESTS = [
    f"tests/{name}.py"
    for name in (
        "ops/test_packed",
        "ops/test_nm_keep",
        "build/test_triton_compile",
        "packed/test_checkpoint",
        "cli/test_cli",
        "models/test_stored_dtypes",
        "packed/test_transformers",
    )
]
# the packages that the tests import besides msp's own dependencies
TOOLS = ["pytest", "hypothesis"]


@dataclass(frozen=True)
class Row:
    """``oldest``: the dependencies at their lower bounds, ``("*",)`` for all; the others are as new as pip allows."""

    name: str
    python: str
    oldest: tuple[str, ...] = ()


ROWS = (
    Row("oldest", "3.10", ("*",)),
    Row("oldest torch", "3.12", ("torch",)),
    Row("oldest transformers", "3.11", ("transformers",)),
    Row("newest on the oldest Python", "3.10"),
    Row("newest", "3.13"),
    Row("newest on the next Python", "3.14"),
)


def bounds() -> dict[str, str]:
    """The lower bound of every dependency, and of accelerate, which loading with a ``device_map`` needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["accelerate"]]:
        match = re.match(r"([\w-]+)>=([\d.]+)(;|$)", requirement)
        assert match, f"{requirement}: not a lower bound alone"
        found[match[1]] = match[2]
    return found


def requirements(row: Row) -> dict[str, str]:
    """The requirements for pip, by name."""
    return {
        name: f"{name}=={low}" if row.oldest == ("*",) or name in row.oldest else f"{name}>={low}"
        for name, low in bounds().items()
    }


def find_python(version: str) -> str | None:
    """An interpreter of ``version``, like ``3.12``."""
    named = f"python{version}"
    candidates = [*os.environ.get("PYTHONS", "").split(), shutil.which(named)]
    candidates.append(_said("uv", "python", "find", version))
    for python in filter(None, candidates):
        if _said(python, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])") == version:
            return python
    home = FOLDER / named
    if not (home / "bin" / "python").exists():
        _said("conda", "create", "--yes", "--quiet", "--prefix", str(home), f"python={version}")
    if (home / "bin" / "python").exists():
        return str(home / "bin" / "python")
    return _said("uv", "python", "find", version) if _said("uv", "python", "install", version) is not None else None


def _said(*command: str) -> str | None:
    """The output of a command; None if there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


class Failed(Exception):
    pass


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """The whole output of a command; ``Failed`` with its last lines if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**_environment(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip() and "%|" not in line]
    if done.returncode:
        raise Failed("\n".join(lines[-12:]))
    return "\n".join(lines)


def _environment() -> dict[str, str]:
    """The environment without variables that lead to another msp or another path through it."""
    ours = ("PYTHONPATH", "PYTHONHOME", "MSP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {"HF_HUB_OFFLINE": "1"}


def environment(row: Row, python: str) -> Path:
    """The interpreter of the row's environment, which is created if it is absent."""
    home = FOLDER / "environments" / row.name.replace(" ", "-")
    inside, stamp, asked = home / "bin" / "python", home / "asked.json", requirements(row)
    wanted = json.dumps([row.python, asked, TOOLS])
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(home, ignore_errors=True)
        run(python, "-m", "venv", home)
        pip = (inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir")
        run(*pip, *asked.values(), *TOOLS)
        stamp.write_text(wanted)
    return inside


def wheel(python: str, version: str, source: Path) -> Path:
    folder = FOLDER / "wheels" / version
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, MSP_CUDA="0")
    (built,) = folder.glob("*.whl")
    return built


def versions(python: Path) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "--disable-pip-version-check", "list", "--format=json"))
    found = {each["name"].lower(): each["version"] for each in listed}
    return {name: found[name] for name in bounds() if name in found}


def check(row: Row, source: Path) -> dict[str, Any]:
    """The result of one row, except for the models of the others."""
    result: dict[str, Any] = {"row": row.name, "python": row.python, "passed": False, "reason": ""}
    python = find_python(row.python)
    if python is None:
        return result | {"passed": None, "reason": f"not run: no Python {row.python} here"}
    try:
        inside = environment(row, python)
        pip = (inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
        run(*pip, "--force-reinstall", wheel(python, row.python, source))
        result["python"] = run(inside, "-c", "import platform; print(platform.python_version())")
        result["versions"] = versions(inside)
        model = FOLDER / "models" / row.name.replace(" ", "-")
        shutil.rmtree(model, ignore_errors=True)
        result["golden"] = run(inside, source / "tests/golden_results.py", "--save", model, cwd=FOLDER).splitlines()[-1]
        # neither `python -m pytest` nor in the source folder: the tests' own processes would import msp from there
        pytest = (inside.parent / "pytest", "-q", "-p", "no:cacheprovider", "-c", source / "pyproject.toml")
        tests = run(*pytest, *(source / test for test in TESTS), cwd=FOLDER)
        result["tests"] = re.sub(r" in [\d.]+s.*", "", tests.splitlines()[-1]).strip("= ")
    except Failed as error:
        return result | {"reason": str(error)}
    return result | {"passed": True, "interpreter": str(inside)}


def exchange(rows: Sequence[dict[str, Any]], source: Path) -> None:
    """Decode in every row that passed, with the models of every row."""
    models = sorted((FOLDER / "models").iterdir())
    for result in rows:
        python = result.pop("interpreter", None)
        if python is None:
            continue
        try:
            run(python, source / "tests/golden_results.py", "--load", *models, cwd=FOLDER)
            result["models"] = len(models)
        except Failed as error:
            result |= {"passed": False, "reason": str(error)}


def table(results: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| row | Python | torch | Triton | transformers | NumPy | golden results | tests | models of all rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        found = row.get("versions", {})
        if row["passed"] is None:
            told = [row["reason"], "", ""]
        elif row["passed"]:
            told = ["equal", row["tests"], "the same tokens"]
        else:
            told = ["failed: " + row["reason"].splitlines()[-1], "", ""]
        names = [found.get(name, "") for name in ("torch", "triton", "transformers", "numpy")]
        lines.append("| " + " | ".join([row["row"], row["python"], *names, *told]) + " |")
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines) + "\n"


def write_table(results: Mapping[str, Any]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the one row of this name; nothing is recorded then")
    parser.add_argument("--anew", action="store_true", help="make all environments anew, with the newest packages")
    parser.add_argument("--drop", action="store_true", help="remove them afterwards: 5 GB each with torch for CUDA")
    asked = parser.parse_args(arguments)
    for name in ["models", "source", *(["environments"] if asked.anew else [])]:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = FOLDER / "source"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, source)
    rows = []
    for row in [row for row in ROWS if asked.only in (None, row.name)]:
        print(f"== {row.name}", flush=True)
        rows.append(check(row, source))
        print(json.dumps(rows[-1], indent=1), flush=True)
    exchange(rows, source)
    results = {
        "commit": run("git", "-C", source, "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
        "processor": next(
            (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown"
        ),
        "tests": TESTS,
        "rows": rows,
    }
    if asked.only is None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_table(results)
    print(table(results))
    if asked.drop:
        shutil.rmtree(FOLDER / "environments")
    return int(any(row["passed"] is False for row in rows))


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    sys.exit(main())
