"""Prints the conditions of a result as JSON: device, driver, versions, and the kernels that are built."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import subprocess
from importlib import metadata
from typing import Any


def first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def smi(query: str) -> str | None:
    return first_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": smi("driver_version"),
        "clocks": smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit"),
    }


def kernels() -> dict[str, Any]:
    """Targets of ``msp._cuda`` and backends by op; a part that is not built is marked."""
    try:
        import msp.ops
        from msp.ops import _dispatch

        for module in pkgutil.iter_modules(msp.ops.__path__):  # not all of them are imported by the package
            importlib.import_module(f"msp.ops.{module.name}")
        backends = {name: list(op.available()) for name, op in _dispatch._ops.items()}
        backends |= {
            f"{name}.{form}": list(of.available())
            for name, op in _dispatch._ops.items()
            for form, of in op.forms.items()
        }
        return {"archs": importlib.import_module("msp._cuda").archs(), "backends": backends}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def describe() -> dict[str, Any]:
    import torch

    packages = (
        "triton",
        "transformers",
        "numpy",
        "pybind11",
        "nvidia-cusparselt-cu13",
        "nvidia-cusparselt-cu12",
    )
    nvcc = first_line("sh", "-c", "nvcc --version | tail -n 1")
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"cuda": torch.version.cuda, "nvcc": nvcc}
    versions |= {package: found for package in packages if (found := version(package))}
    return {"device": device(), "versions": versions, "kernels": kernels()}


if __name__ == "__main__":
    print(json.dumps(describe()))
