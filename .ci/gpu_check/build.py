"""Builds the compiled modules for this machine's GPU if they are missing or older than their sources."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from gpu_check.process import ROOT, run

LIMIT = 240.0
NEEDED = ("setuptools", "pybind11")
IMPORTS = "import msp, msp._cpu, msp._cuda, msp.triton_kernels; print(msp.__file__, msp._cuda.__file__)"


def up_to_date() -> bool:
    """Whether this Python imports the modules of this folder, newer than all their sources."""
    done = run([sys.executable, "-c", IMPORTS], 120)
    if done.code != 0:
        return False
    package, module = map(Path, done.out.split()[-2:])
    if package.resolve().parent != ROOT / "msp":
        return False
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in [ROOT / "CMakeLists.txt", ROOT / "setup.py", *sources])
    return module.stat().st_mtime >= newest


def target(capability: str) -> str | None:
    """The one target to build for, so that the build does not take the time of all; None leaves it to setup.py."""
    major, minor = capability.split(".")
    if int(major) == 8:
        return major + minor
    return "90a" if capability == "9.0" else None


def build(capability: str) -> dict[str, Any]:
    """An editable installation without isolation or dependencies: it needs no network."""
    if up_to_date():
        return {"outcome": "passed", "built": False}
    tools = ("cmake", "ninja")
    beside = str(Path(sys.executable).parent)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    missing += [name for name in tools if not (shutil.which(name) or shutil.which(name, path=beside))]
    if missing:
        return {"outcome": "failed", "why": f"to build it, {', '.join(missing)} must be installed for {sys.executable}"}
    environment = {"MSP_CUDA": "1"}
    chosen = os.environ.get("MSP_CUDA_ARCHS") or target(capability)
    if chosen:
        environment["MSP_CUDA_ARCHS"] = chosen
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    done = run(pip, LIMIT, **environment)
    result = {"built": True, "archs": chosen, "seconds": round(done.seconds, 1)}
    if done.code == 0 and up_to_date():
        return {"outcome": "passed", **result}
    return {"outcome": "timeout" if done.code is None else "failed", "why": done.tail(), **result}
