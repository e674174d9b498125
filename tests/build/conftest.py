"""Shared by the tests of what is built.

``MSP_CUDA_MODULE=path/to/_cuda.so`` has them read that module in place of the installed one: ``make wheel`` gives them
the one of the wheel, which is built for more targets.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cubins
import kernel_table
import pytest

if os.environ.get("MSP_CUDA_MODULE"):
    cubins.use_module(Path(os.environ["MSP_CUDA_MODULE"]).resolve())


@pytest.fixture(scope="session")
def module() -> Path:
    """The built ``msp._cuda``."""
    path = cubins.cuda_module()
    if path is None:
        pytest.skip("msp._cuda is not built on this machine")
    return path


@pytest.fixture(scope="session")
def cuda_kernels(module: Path) -> tuple[cubins.Kernel, ...]:
    """What ``msp._cuda`` holds, for every target it was built for."""
    if cubins.find_tool("cuobjdump") is None:
        pytest.skip("neither the CUDA toolkit nor Triton brings cuobjdump")
    return cubins.read_kernels(module)


@pytest.fixture(scope="session")
def triton_cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every Triton kernel, compiled for every architecture: what ``msp.triton_kernels.targets`` prints."""
    pytest.importorskip("triton")
    return kernel_table.compile_triton("--cubins", str(tmp_path_factory.mktemp("cubins")))
