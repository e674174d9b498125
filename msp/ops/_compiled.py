"""The compiled modules ``msp._cpu`` and ``msp._cuda``: found, found but broken, or not installed.

An installation may lack either; plain torch or Triton then serve. A file that does not import is a defect of the
installation: a warning names it, or an error if ``MSP_REQUIRE`` asks for the module.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from msp.errors import MspError, UsageError

MODULES = {"cpu": "msp._cpu", "cuda": "msp._cuda"}
SLOWER = {"msp._cpu": "ops on CPU tensors run in plain torch", "msp._cuda": "ops on GPU tensors run in Triton or torch"}


@functools.cache
def compiled_module(name: str) -> Any | None:
    """``msp._cpu`` or ``msp._cuda`` if this installation has it, else None.

    Warns once a process about a file that does not import.

    Raises:
        MspError: ``MSP_REQUIRE`` names the module, and it does not import or is not installed. UsageError:
        ``MSP_REQUIRE`` names anything but ``cpu`` and ``cuda``.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # the initialisation of a module may raise anything
        files = module_files(name)
        reason = f"{type(error).__name__}: {error}"
    if name in required_modules():
        found = f"{', '.join(files)} does not import: {reason}" if files else "no such file is installed"
        raise MspError(f"MSP_REQUIRE asks for the compiled module {name}, but {found}; build msp again for this Python")
    if files:
        warnings.warn(
            f"the compiled module {name} is there but does not import, so {SLOWER[name]}, far slower: "
            f"{', '.join(files)}: {reason}. Install or build msp again, with this Python ({sys.executable})",
            stacklevel=2,
        )
    return None


def compiled(name: str) -> Any:
    """The compiled module ``name``, which must be here."""
    module = compiled_module(name)
    assert module is not None
    return module


def module_files(name: str) -> list[str]:
    """The shared libraries that could be module ``name``, including those that were built for another Python."""
    package, _, stem = name.rpartition(".")
    folders = [Path(folder) for folder in importlib.import_module(package).__path__]
    return sorted(
        str(file) for folder in folders for suffix in ("so", "pyd") for file in folder.glob(f"{stem}.*{suffix}")
    )


def required_modules() -> set[str]:
    """The modules in ``MSP_REQUIRE``, a list of ``cpu`` and ``cuda`` with commas between.

    Raises:
        UsageError: it names anything else.
    """
    names = {word.strip().lower() for word in os.environ.get("MSP_REQUIRE", "").split(",")} - {""}
    if unknown := sorted(names - MODULES.keys()):
        raise UsageError(f"MSP_REQUIRE names {', '.join(unknown)}, but knows {', '.join(MODULES)} only")
    return {MODULES[name] for name in names}


def check_required() -> None:
    """Import the modules in ``MSP_REQUIRE``.

    Raises:
        MspError, UsageError: as ``compiled_module``.
    """
    for name in sorted(required_modules()):
        compiled_module(name)
