"""docs/kernels/resources.md says what the kernels of this commit take."""

from __future__ import annotations

import re

import cubins
import kernel_table
import pytest


def rows_under(heading: str) -> list[str]:
    """The rows of the page below ``heading``; skips where the page is of another compiler or other targets."""
    page = kernel_table.PAGE.read_text(encoding="utf-8")
    kind = heading.split(",")[0]
    there = re.search(rf"^{kind}.*$", page, re.MULTILINE)
    assert there, f"{kernel_table.PAGE.name} has no section {kind}: make kernel-table"
    if there[0] != heading:
        pytest.skip(f"the page was made {there[0].partition(', ')[2]}, here it is {heading.partition(', ')[2]}")
    section = page[there.end() :].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


def test_cuda_kernels_are_as_the_page_says(module, cuda_kernels) -> None:
    found = kernel_table.cuda_rows(cuda_kernels)
    assert found and rows_under(kernel_table.cuda_heading(module)) == found, "make kernel-table"


def test_triton_kernels_are_as_the_page_says(triton_cases) -> None:
    if cubins.find_tool("cuobjdump") is None:
        pytest.skip("neither the CUDA toolkit nor Triton brings cuobjdump")
    found = kernel_table.triton_rows(triton_cases)
    assert found and rows_under(kernel_table.triton_heading()) == found, "make kernel-table"


def test_ranges_and_instructions() -> None:
    assert kernel_table.span([3, 1, 2]) == "1-3" and kernel_table.span([2, 2]) == "2"
    assert kernel_table.span([96.0156]) == "96"
    sparse = cubins.Kernel("sm_90a", "k<1>", 384, 168, 0, 0, 0, tuple(["HGMMA.SP.64x128x32.F32.BF16"] * 4))
    both = cubins.Kernel("sm_90a", "k<2>", 384, 80, 0, 8, 0, (*["HGMMA.SP.64x8x32"] * 4, "HGMMA.64x8x16.F32"))
    assert kernel_table.labels(sparse) == {"HGMMA.SP"} and kernel_table.labels(both) == {"HGMMA.SP", "HGMMA"}
    line = kernel_table.line("k", [sparse, both], [200 << 10, 100 << 10], [1, 1])
    assert line == "| `k` | sm_90a | 2 | 384 | 80-168 | 100-200 | 1 | 1-2 (1) | 19-38 % | HGMMA.SP, (HGMMA) |"
