"""Imports run downwards only, so every module can be the first one that a program imports."""

from __future__ import annotations

import ast
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import msp

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
    assert {"msp.search.evolution", "msp.allocators.base"} <= set(names)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", IMPORT_EACH, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=600)
    assert done.stdout == ""


def test_no_test_imports_another() -> None:
    """What several tests need is a module of its own, so that each test file can go or change by itself."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[-1].startswith(("test_", "conftest"))], path
