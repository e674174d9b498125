"""Imports run downwards only, in the order of the rooms in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import msp

ROOT = Path(__file__).resolve().parents[1]
# Forked from a process that has what they all import, since that is what takes long.
IMPORT_EACH = """
import importlib, os, sys
import numpy, torch, transformers

for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_module_can_be_imported_first() -> None:
    names = [module.name for module in pkgutil.walk_packages(msp.__path__, "msp.") if "__main__" not in module.name]
    assert {"msp.engine.evolution", "msp.allocators.base"} <= set(names)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", IMPORT_EACH, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=600)
    assert done.stdout == ""


def rooms() -> list[str]:
    """The rooms of the table in CONTRIBUTING.md, the lowest first."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `msp/(\w+)/` \|", text, re.MULTILINE)[::-1]


def imported(path: Path) -> set[str]:
    """The modules of msp that a file imports anywhere, in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports from a relative module"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("msp.")}


def upward(order: list[str], room: str, modules: set[str]) -> list[str]:
    """The modules that a file of ``room`` must not import."""
    above = set(order[order.index(room) + 1 :]) if room else set(order)
    return sorted(module for module in modules if module.split(".")[1] in above)


def test_a_room_imports_only_from_those_below_it() -> None:
    order = rooms()
    folders = {path.parent.name for path in (ROOT / "msp").glob("*/__init__.py") if not path.parent.is_symlink()}
    assert folders - {"triton_kernels"} == set(order)
    assert upward(order, "base", {"msp.base.files", "msp.verbs.prune"}) == ["msp.verbs.prune"]
    wrong = {
        f"{room}/{path.name}": found
        for room in order
        for path in (ROOT / "msp" / room).rglob("*.py")
        if (found := upward(order, room, imported(path)))
    }
    assert not wrong
    assert not upward(order, "", imported(ROOT / "msp" / "errors.py"))


def test_engine_and_allocators_know_only_the_interface_of_compressions() -> None:
    for room in ("engine", "allocators"):
        for path in (ROOT / "msp" / room).glob("*.py"):
            modules = imported(path)
            assert not [name for name in modules if re.match(r"msp\.(compressions\.(?!base\b)|formats)", name)], path
            assert not {"msp.ops", "msp.packed"} & {".".join(name.split(".")[:2]) for name in modules}, path


def test_no_test_imports_another() -> None:
    """What several tests need is a module of its own, so that each test file can go or change by itself."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[-1].startswith(("test_", "conftest"))], path
