"""What nvcc made of the kernels, read from the built module: no GPU is needed to see a spill."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# 128 threads of 128 registers: four blocks, or 16 warps, on a multiprocessor
MOST_REGISTERS = 128
KERNEL = re.compile(r"nm_select_kernel\w*DtypeE(\d)ELi(\d+)E\w*ScoreKindE(\d)E")


@pytest.fixture(scope="module")
def module() -> Path:
    spec = importlib.util.find_spec("msp._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("msp._cuda is not built on this machine")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """nvcc's, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    candidates = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    if triton is not None and triton.submodule_search_locations:
        candidates.append(f"{triton.submodule_search_locations[0]}/backends/nvidia/bin/cuobjdump")
    found = next((path for path in candidates if path and Path(path).is_file()), None)
    if found is None:
        pytest.skip("neither the CUDA toolkit nor Triton brings cuobjdump")
    return found


def read(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def resources(cuobjdump: str, module: Path) -> dict[tuple[str, str], dict[str, int]]:
    """``(target, kernel) -> {"REG": ..., "STACK": ..., "LOCAL": ..., ...}``."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    target = name = ""
    for line in read(cuobjdump, "--dump-resource-usage", module).splitlines():
        if match := re.search(r"arch = (sm_\w+)|\.(sm_\w+)\.cubin", line):
            target = match[1] or match[2]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[target, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def test_module_imports_without_a_driver(module: Path) -> None:
    import msp._cuda

    assert msp._cuda.archs()
    needed = read("readelf", "--dynamic", module) if shutil.which("readelf") else ""
    assert "libcudart" not in needed and "libtorch" not in needed and "libcuda." not in needed


def test_every_kernel_is_there_for_every_target(resources, module: Path, cuobjdump: str) -> None:
    import msp._cuda

    archs = msp._cuda.archs()
    for arch in archs:
        kernels = [KERNEL.search(name) for target, name in resources if target == f"sm_{arch}"]
        variants = {match.groups() for match in kernels if match}
        assert len(variants) == 3 * 4 * 5, f"sm_{arch}"
    newest = re.sub("[a-z]+$", "", archs[-1])
    assert f"sm_{newest}.ptx" in read(cuobjdump, "--list-ptx", module)


def test_no_kernel_spills(resources) -> None:
    wrong = {
        key: use
        for key, use in resources.items()
        if use["STACK"] or use["LOCAL"] or use["REG"] > MOST_REGISTERS
    }  # fmt: skip
    assert resources and not wrong


def test_weights_are_read_16_bytes_at_a_time(module: Path, cuobjdump: str) -> None:
    import msp._cuda

    target = f"sm_{msp._cuda.archs()[-1]}"
    sass = read(cuobjdump, "--dump-sass", "--gpu-architecture", target, module)
    functions = sass.split("Function : ")[1:]
    seen = 0
    for function in functions:
        match = KERNEL.search(function.partition("\n")[0])
        if match is None:
            continue
        seen += 1
        dtype, group_size, kind = int(match[1]), int(match[2]), int(match[3])
        element = 4 if dtype == 0 else 2
        unit = max(8, group_size)
        fp32_terms = {0: 0, 1: 1, 2: 2, 3: 1, 4: 1}[kind]
        wide = re.findall(r"\bLDG\.\S*128", function)
        assert len(wide) >= unit * element // 16 + fp32_terms * unit * 4 // 16, match[0]
        assert not re.search(r"\b(LDL|STL)\b", function), match[0]
        assert re.search(r"\bSTG\.\S*128", function), match[0]
    assert seen == 3 * 4 * 5
