"""The compiled modules, built by CMake; everything else about the package is in pyproject.toml.

Environment variables:
    MSP_CUDA        1 builds ``msp._cuda`` and fails without nvcc, 0 leaves it out; default: if nvcc is found
    MSP_CUDA_ARCHS  targets of the CUDA kernels, default ``80;90a``; PTX of the last one serves newer GPUs
    MSP_SANITIZE    1 builds ``msp._cpu`` with the address and undefined-behaviour sanitizers
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# sm_86 and sm_89 run the code of sm_80; a released wheel has code of their own (.ci/release_wheel.py)
CUDA_ARCHS = "80;90a"


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in [*homes, "/usr/local/cuda"])]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def find_tool(name: str) -> str:
    """On PATH, or beside this Python, as pip installs it in an environment that is not activated."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit(f"{name} is neither on PATH nor installed beside {sys.executable}")
    return found


def cuda_wanted() -> bool:
    wanted = os.environ.get("MSP_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MSP_CUDA={wanted} is not 0 or 1")
    if wanted == "1" and find_nvcc() is None:
        raise SystemExit("MSP_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
    return wanted != "0" and find_nvcc() is not None


class CMakeBuild(build_ext):
    """Builds all extensions with one CMake project and copies each to where setuptools wants it."""

    def run(self) -> None:
        sanitize = os.environ.get("MSP_SANITIZE") == "1"
        archs = os.environ.get("MSP_CUDA_ARCHS") or CUDA_ARCHS
        kind = "-sanitize" if sanitize else "" if archs == CUDA_ARCHS else "-" + archs.replace(";", "-")
        # not build_temp, which an editable installation makes anew each time
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{kind}"
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        cuda = any(extension.name == "msp._cuda" for extension in self.extensions)
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        # named each time: an isolated build brings its own ninja and pybind11, gone the next time
        configure += [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMSP_OUTPUT={build}",
            f"-DMSP_CUDA={'ON' if cuda else 'OFF'}",
            f"-DMSP_SANITIZE={'ON' if sanitize else 'OFF'}",
        ]
        if cuda:
            configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DMSP_CUDA_ARCHS={archs}"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(build / target.name), str(target))

    def get_source_files(self) -> list[str]:
        """What the source distribution needs beside the Python files."""
        native = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
        return [str(p.relative_to(ROOT)) for p in [ROOT / "CMakeLists.txt", *sorted(native)]]


extensions = [Extension("msp._cpu", sources=[])]
if cuda_wanted():
    extensions.append(Extension("msp._cuda", sources=[]))

# triton_kernels is a top-level folder here, but its bare name belongs to another distribution
kernels = "msp.triton_kernels"
packages = [name for name in find_packages(include=["msp", "msp.*"]) if name != kernels]

setup(
    packages=[*packages, kernels],
    package_dir={kernels: "triton_kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild},
)
