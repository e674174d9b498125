"""Makes docs/kernels/resources.md, what each GPU kernel takes and is made of, from the compiled kernels: no GPU needed.

``python tests/build/kernel_table.py``, or ``make kernel-table``; ``test_kernel_table.py`` holds the page against it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cubins
from cubins import LIMITS, Kernel
from plans import plan_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels" / "resources.md"
# label -> opcode and modifiers
INSTRUCTIONS: dict[str, tuple[str | int, ...]] = {
    "HMMA.SP": ("HMMA", "SP"),
    "HMMA": ("HMMA",),
    "HGMMA.SP": ("HGMMA", "SP"),
    "HGMMA": ("HGMMA",),
    "UTCHMMA": ("UTCHMMA",),
    "LDG.128": ("LDG", 128),
    "LDGSTS.128": ("LDGSTS", 128),
    "UTMALDG": ("UTMALDG",),
    "UBLKCP": ("UBLKCP",),
    "LDSM": ("LDSM",),
    "LDS.128": ("LDS", 128),
    "STG.128": ("STG", 128),
    "UTMASTG": ("UTMASTG",),
    "RED": ("RED",),
    "ATOMG": ("ATOMG",),
}
HEAD = """\
# What the GPU kernels take

Made by `make kernel-table`, which reads the compiled kernels; no GPU was needed, and nothing here is a speed. A
kernel that is a template stands for all its variants: a range where they differ, instructions that only some have in
brackets. Blocks is how many of its blocks one multiprocessor holds at a time by registers, threads and shared memory
(static, and as much dynamic as a launch asks for at most), beside it in brackets how many it was written for, and
occupancy the share of the multiprocessor's warps that they are.
"""
COLUMNS = (
    "kernel",
    "target",
    "variants",
    "threads",
    "registers",
    "shared KiB",
    "spills",
    "blocks",
    "occupancy",
    "instructions",
)


def span(values: Iterable[float]) -> str:
    values = list(values)
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def labels(kernel: Kernel) -> set[str]:
    """The instructions worth naming; a plain ``HMMA`` is not also what ``HMMA.SP`` counts."""
    found = {label for label, wanted in INSTRUCTIONS.items() if kernel.count(*wanted)}
    for plain in ("HMMA", "HGMMA"):
        if kernel.count(plain) == kernel.count(plain, "SP"):
            found.discard(plain)
    return found


def line(name: str, kernels: list[Kernel], shared: list[int], planned: list[int]) -> str:
    """One row; ``shared`` is each kernel's dynamic shared memory in bytes, ``planned`` its blocks where known."""
    limits = LIMITS[kernels[0].capability]
    blocks = [kernel.blocks(dynamic_shared=size) for kernel, size in zip(kernels, shared, strict=True)]
    warps = [-(-kernel.threads // 32) * count for kernel, count in zip(kernels, blocks, strict=True)]
    found = [labels(kernel) for kernel in kernels]
    always, ever = set.intersection(*found), set.union(*found)
    cells = (
        f"`{name}`",
        kernels[0].target,
        str(len(kernels)),
        span(kernel.threads for kernel in kernels),
        span(kernel.registers for kernel in kernels),
        span((kernel.shared + size) / 1024 for kernel, size in zip(kernels, shared, strict=True)),
        str(sum(kernel.spilled for kernel in kernels)),
        span(blocks) + (f" ({span(planned)})" if planned else ""),
        span(round(100 * count / limits.warps) for count in warps) + " %",
        ", ".join(label if label in always else f"({label})" for label in INSTRUCTIONS if label in ever) or "-",
    )
    return f"| {' | '.join(cells)} |"


def table(rows: Iterable[str]) -> str:
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *rows]) + "\n"


def cuda_rows(kernels: Iterable[Kernel]) -> list[str]:
    families: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        families[kernel.family, kernel.target].append(kernel)
    rows = []
    for (name, _), group in sorted(families.items()):
        plans = [plan_of(kernel) for kernel in group]
        rows.append(line(name, group, [plan.dynamic_shared for plan in plans], [plan.blocks for plan in plans]))
    return rows


def triton_rows(cases: Iterable[dict[str, Any]]) -> list[str]:
    """From what ``msp.triton_kernels.targets --cubins`` printed. All of a Triton kernel's shared memory is dynamic."""
    families: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        families[case["op"], case["kernel"], case["architecture"]].append(case)
    rows = []
    for (op, name, _), group in sorted(families.items()):
        kernels = [kernel for case in group for kernel in cubins.read_kernels(Path(case["cubin"]))]
        rows.append(line(f"{op}.{name}", kernels, [case["shared_bytes"] for case in group], []))
    return rows


def compile_triton(*options: str) -> list[dict[str, Any]]:
    """What ``msp.triton_kernels.targets`` prints, in a process of its own, where Triton is no interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "msp.triton_kernels.targets", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [json.loads(text) for text in done.stdout.splitlines()]


def nvcc_version(module: Path) -> str:
    """Of the compiler that made it, which leaves its name in every cubin."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", module.read_bytes())
    return found[1].decode() if found else "unknown"


def cuda_heading(module: Path) -> str:
    archs = ", ".join(f"sm_{arch}" for arch in importlib.import_module("msp._cuda").archs())
    return f"## CUDA, by nvcc {nvcc_version(module)} for {archs}"


def triton_heading() -> str:
    return f"## Triton, by Triton {importlib.import_module('triton').__version__}"


def section(heading: str, rows: list[str]) -> str:
    return f"\n{heading}\n\n{table(rows)}"


def main() -> None:
    module = cubins.cuda_module()
    if module is None or cubins.find_tool("cuobjdump") is None:
        raise SystemExit("msp._cuda or cuobjdump is not here: build with nvcc first")
    with tempfile.TemporaryDirectory() as folder:
        triton = section(triton_heading(), triton_rows(compile_triton("--cubins", folder)))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(HEAD + section(cuda_heading(module), cuda_rows(cubins.read_kernels(module))) + triton, "utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
