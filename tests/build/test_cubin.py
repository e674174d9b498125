"""What nvcc made of the kernels, read from the built module: no GPU is needed to see a spill."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import cubins
import pytest
import torch
from plans import plan_of

# dtypes, group sizes and kinds of score
SELECT_VARIANTS = 3 * 4 * 5


def test_module_imports_without_a_driver(module: Path) -> None:
    import msp._cuda

    assert msp._cuda.archs()
    assert torch.cuda.is_available() or not msp._cuda.usable()
    if shutil.which("readelf"):
        command = ["readelf", "--dynamic", str(module)]
        needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "libcudart" not in needed and "libtorch" not in needed and "libcuda." not in needed


def test_there_is_machine_code_for_every_target_and_ptx_for_newer_ones(cuda_kernels, module: Path) -> None:
    import msp._cuda

    archs = msp._cuda.archs()
    for arch in archs:
        built = Counter(kernel.family for kernel in cuda_kernels if kernel.target == f"sm_{arch}")
        assert built["nm_select_kernel"] == SELECT_VARIANTS, f"sm_{arch}"
    assert {kernel.target for kernel in cuda_kernels} == {f"sm_{arch}" for arch in archs}
    newest = re.sub("[a-z]+$", "", archs[-1])
    tool = cubins.find_tool("cuobjdump")
    listed = subprocess.run([tool, "--list-ptx", str(module)], capture_output=True, text=True, check=True).stdout
    assert f"sm_{newest}.ptx" in listed


def test_no_kernel_spills(cuda_kernels) -> None:
    assert cuda_kernels and [kernel for kernel in cuda_kernels if kernel.spilled] == []


def test_every_kernel_leaves_the_room_it_was_planned_to(cuda_kernels) -> None:
    for kernel in cuda_kernels:
        plan = plan_of(kernel)
        assert kernel.threads, f"{kernel.name} has no launch bounds"
        assert kernel.blocks(dynamic_shared=plan.dynamic_shared) >= plan.blocks, kernel


def test_selection_moves_weights_16_bytes_at_a_time(cuda_kernels) -> None:
    for kernel in cubins.family(cuda_kernels, "nm_select_kernel"):
        dtype, group_size, kind = map(int, kernel.arguments)
        element = 4 if dtype == 0 else 2
        unit = max(8, group_size)
        fp32_terms = {0: 0, 1: 1, 2: 2, 3: 1, 4: 1}[kind]
        assert kernel.count("LDG", 128) >= unit * element // 16 + fp32_terms * unit * 4 // 16, kernel.name
        assert kernel.count("STG", 128), kernel.name


def kernel_of(target: str, **changes) -> cubins.Kernel:
    use = {"threads": 128, "registers": 64, "stack": 0, "local": 0, "shared": 0, "sequence": ()}
    return cubins.Kernel(target, "some_kernel<1, 2>", **{**use, **changes})


@pytest.mark.parametrize(
    ("kernel", "dynamic_shared", "blocks"),
    [
        (kernel_of("sm_80"), 0, 8),  # 65536 / (64 * 128)
        (kernel_of("sm_80", registers=65), 0, 7),  # 72 registers, in granules of 8
        (kernel_of("sm_80", threads=1024), 0, 1),
        (kernel_of("sm_80", threads=32, registers=16), 0, 32),
        (kernel_of("sm_86", registers=16), 0, 12),  # 48 warps
        (kernel_of("sm_90a", shared=40 << 10), 0, 5),  # 228 / (40 + 1)
        (kernel_of("sm_90a", threads=384, registers=168), 220 << 10, 1),
    ],
)
def test_occupancy(kernel: cubins.Kernel, dynamic_shared: int, blocks: int) -> None:
    assert kernel.blocks(dynamic_shared=dynamic_shared) == blocks


def test_instructions_are_counted_by_their_modifiers() -> None:
    times = {"HMMA.SP.16832.F32.BF16": 4, "HMMA.16816.F32": 2, "LDG.E.128.CONSTANT": 3, "LDG.E": 5}
    kernel = kernel_of("sm_80", sequence=tuple(Counter(times).elements()))
    assert kernel.count("HMMA") == 6 and kernel.count("HMMA", "SP") == 4
    assert kernel.count("LDG", 128) == 3 and not kernel.spilled
    assert kernel_of("sm_80", sequence=("STL.64",)).spilled
