"""The source distribution builds, its wheel holds what it should, and both kinds of installation import."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import release_wheel as release

from msp.ops._dispatch import ISAS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("msp", "triton_kernels", "csrc", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
SETUP = ("pyproject.toml", "setup.py")

IMPORTS = """
import importlib.metadata, pathlib, sys
import msp, msp._cpu, msp.triton_kernels, msp.formats.patterns
from msp.triton_kernels import nm_select
home = pathlib.Path(sys.argv[1]).resolve()
for module in (msp, msp._cpu, msp.triton_kernels):
    found = pathlib.Path(module.__file__).resolve()
    assert home in found.parents, f"{module.__name__} comes from {found}, not from {home}"
assert importlib.metadata.version("mixed-sparsity-pruning") == msp.__version__
assert [e.value for e in importlib.metadata.entry_points(group="console_scripts", name="msp")] == ["msp.cli:main"]
import torch
from msp.ops import force_backend, nm_select
with force_backend("cpu"):
    packed = nm_select(torch.randn(5, 24), msp.NMPattern(2, 8))
packed.check()
assert packed.kept().sum() == 5 * 24 // 4
print(msp._cpu.isa())
"""


# what pip installed beside this Python comes first
SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "MSP_ISA", "MSP_SANITIZE", "MSP_REQUIRE")
    }
    env["PATH"] = SEARCHED
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def without_nvcc() -> dict[str, str]:
    """An environment in which setup.py finds no nvcc; MSP_CUDA=0 where it would find one that is not on PATH."""
    folders = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    path = os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())
    elsewhere = any(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")) or Path("/usr/local/cuda").exists()
    # a compiler may lie beside nvcc
    compiler = {"CXX": found} if (found := shutil.which(os.environ.get("CXX", "c++"))) else {}
    return {"PATH": path, "MSP_CUDA": "0" if elsewhere else "", **compiler}


def copy_source(target: Path) -> Path:
    target.mkdir()
    for name in (*SOURCES, *SETUP):
        source = ROOT / name
        if source.is_dir():
            # a link to triton_kernels inside msp is a convenience of one checkout and no part of the package
            unwanted = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, target / name, symlinks=True, ignore=unwanted)
        elif source.exists():
            shutil.copy(source, target / name)
    link = target / "msp" / "triton_kernels"
    if link.is_symlink():
        link.unlink()
    return target


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not the msp installed here."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    scheme = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # added by a .pth file, so that the .pth files in there, the editable msp's among them, do not run
    (Path(scheme) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    return copy_source(tmp_path_factory.mktemp("source") / "msp")


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    backend = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    run(sys.executable, "-c", backend, cwd=source)
    (archive,) = (source / "dist").glob("mixed_sparsity_pruning-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", unpacked.parent, unpacked, cwd=unpacked.parent, **without_nvcc())
    (path,) = unpacked.parent.glob("mixed_sparsity_pruning-*.whl")
    return path


@pytest.fixture(scope="module")
def repaired(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make wheel` hands it on."""
    if importlib.util.find_spec("auditwheel") is None:
        pytest.skip("auditwheel is not installed")
    return release.repair(wheel, tmp_path_factory.mktemp("dist"))


def test_source_distribution_holds_the_kernels(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {
            member.name.partition("/")[2]: archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }
    kernels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "triton_kernels").glob("*.py")}
    native = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    assert len(kernels) > 1 and len(native) > 5
    for name in kernels | native | {"CMakeLists.txt", "setup.py", "pyproject.toml"}:
        assert held.get(name) == (ROOT / name).read_bytes(), name


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert all(name.startswith("msp/") for name in names), names
    python = {path.relative_to(ROOT).as_posix() for path in (ROOT / "msp").rglob("*.py")}
    python |= {f"msp/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == python
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert [name for name in names if name.endswith(".so")] == [f"msp/_cpu{suffix}"]
    assert "msp/py.typed" in names


def test_the_licence_goes_with_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert b"License-Expression: Apache-2.0" in archive.read(metadata)


def test_wheel_imports(repaired: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, repaired, cwd=tmp_path)
    assert run(python, "-c", IMPORTS, tmp_path / "venv", cwd=tmp_path).strip() in ISAS
    help_text = run(tmp_path / "venv" / "bin" / "msp", "--help", cwd=tmp_path)
    assert "Usage" in help_text


def test_the_repaired_wheel_may_be_released(repaired: Path) -> None:
    assert release.check(repaired) == []


def test_a_wheel_that_may_not_be_released_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "mixed_sparsity_pruning-1-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("msp.libs/libstdc++.so", b"x" * 100)
    monkeypatch.setattr(release, "MOST_BYTES", 50)
    size, tag, libraries = release.check(wheel)
    assert "must stay below" in size and "manylinux" in tag and "libstdc++" in libraries


def test_kernels_of_a_wheel_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tests that read machine code, of its own module; what has none has nothing wrong."""
    found = []

    def pytest_fails(command, cwd, env):
        found.append((command, Path(env["MSP_CUDA_MODULE"]).read_bytes()))
        return subprocess.CompletedProcess(command, returncode=1)

    monkeypatch.setattr(release.subprocess, "run", pytest_fails)
    wheel = tmp_path / "mixed_sparsity_pruning-1-cp311-cp311-linux_x86_64.whl"
    for name, wrong in (("msp/_cpu.so", 0), ("msp/_cuda.so", 1)):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(name, b"module")
        assert len(release.check_kernels(wheel)) == wrong == len(found)
    assert set(release.CUBIN_TESTS) <= set(found[0][0]) and found[0][1] == b"module"
    assert all((ROOT / name).is_file() for name in release.CUBIN_TESTS)


def test_source_distribution_builds_the_cuda_kernels(unpacked: Path, tmp_path: Path) -> None:
    """All their sources are there, and nvcc compiles one; byte for byte they are what `make build` compiles."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    if shutil.which("cmake", path=SEARCHED) is None:
        pytest.skip("cmake is not installed")
    import pybind11

    configure = ["cmake", "-S", unpacked, "-B", tmp_path, "-G", "Ninja", "-DMSP_CUDA=ON", "-DMSP_CUDA_ARCHS=90a"]
    configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    run(*configure, f"-DPython_EXECUTABLE={sys.executable}", cwd=tmp_path)
    planned = run("cmake", "--build", tmp_path, "--target", "_cuda", "--", "-n", "-v", cwd=tmp_path)
    sources = sorted((unpacked / "csrc" / "cuda").glob("*.cu"))
    assert sources and not [source for source in sources if str(source) not in planned]
    assert "arch=compute_90a" in planned and "-shared" in planned
    run("cmake", "--build", tmp_path, "--target", "CMakeFiles/_cuda.dir/csrc/cuda/usable.cu.o", cwd=tmp_path)


def test_source_distribution_has_what_nvcc_reads(unpacked: Path) -> None:
    """Every header that a kernel includes is in it, for each kernel on its own."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    kernels = sorted((unpacked / "csrc" / "cuda").glob("*.cu"))
    assert kernels
    for kernel in kernels:
        command = [nvcc, "-M", "-std=c++17", "-arch=sm_90a", f"-I{unpacked / 'csrc'}", str(kernel)]
        listed = subprocess.run(command, capture_output=True, text=True)
        assert listed.returncode == 0, listed.stderr


def test_editable_installation_imports(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    # after the wheel, whose compiled objects it takes over
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", "--editable", unpacked, cwd=tmp_path, **without_nvcc())
    run(python, "-c", IMPORTS, unpacked, cwd=tmp_path)
