"""Builds a test's C++ file, with CUDA kernels emulated on the CPU, into a library for ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
NATIVE = TESTS / "native"


def build(source: str, folder: Path, *kernels: str) -> ctypes.CDLL:
    """``tests/native/<source>`` and kernels of ``csrc/cuda/``, CUDA and PTX emulated, as a library in ``folder``."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("this machine has no C++ compiler")
    library = folder / f"{Path(source).stem}.so"
    strict = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    csrc = TESTS.parent / "csrc"
    includes = [f"-I{NATIVE / 'cuda_headers'}", f"-I{NATIVE}", f"-I{csrc}", "-include", str(NATIVE / "ptx_emulation.h")]
    sources = ["-x", "c++", str(NATIVE / source), *(str(csrc / "cuda" / kernel) for kernel in kernels)]
    command = [compiler, *strict, *includes, '-DMSP_CUDA_ARCHS="80,90a"', "-shared", "-fPIC", *sources]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def call(function, *arguments) -> str:
    """Runs an emulated kernel; returns what it found wrong, or an empty string."""
    function.restype = ctypes.c_char_p
    return function(*arguments).decode()


def pointer(array) -> ctypes.c_void_p:
    """The address of a NumPy array's data, null for None."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
