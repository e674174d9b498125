"""Imports run downwards only, so every module can be the first one that a program imports."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

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
