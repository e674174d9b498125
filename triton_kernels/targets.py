"""Compiles every kernel for real GPUs, on any machine: ``python -m msp.triton_kernels.targets``.

In an op's file, ``compile_cases()`` yields ``CompileCase`` objects: the types and alignment of the arguments as its
launch function passes them, for the settings that differ most, the most frequent first. Every architecture gets a
kernel's first case and Hopper gets all, unless ``--full`` asks for everything. ``--cubins FOLDER`` keeps the compiled
kernels. Nothing is run, and no driver is needed. ``--amd`` compiles for AMD's gfx942 instead: for each kernel the first
case without tensor descriptors.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = 90
ARCHITECTURES = (80, HOPPER, 100)
# MI300: compute units have waves of 64 threads and 64 KiB of shared memory
AMD = GPUTarget("hip", "gfx942", 64)
NO_DESCRIPTORS = "tensor descriptors are for GPUs with a copy engine for tensors (TMA): launched without them elsewhere"


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of argument types and constants.

    Attributes:
        name: distinguishes this case from the kernel's others, like ``bf16-2:8``.
        kernel: a ``triton.jit`` function.
        types: argument -> type for the arguments that are passed at run time: ``*bf16``, ``*fp32``, ``i32``, ...; for
            a tuple, the types of its elements, ``constexpr`` for a pointer that is None.
        constants: argument -> value for ``tl.constexpr`` arguments, strides of 1, and pointers that are None.
        aligned: integer arguments that are multiples of 16 in real models; pointers always are.
        options: ``num_warps``, ``num_stages``, as at launch.
        architectures: compute capabilities that launch it like this.
    """

    name: str
    kernel: Any
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Compiled:
    """The result of a compiled case. ``local_bytes`` is stack and local memory a thread: 0 unless registers spill.

    ``cubin`` is the file that holds it, if a folder for it was given.
    """

    op: str
    kernel: str
    name: str
    architecture: int
    threads: int
    cubin_bytes: int
    shared_bytes: int
    registers: int | None
    local_bytes: int | None
    cubin: str | None = None


def all_cases() -> Iterator[tuple[str, CompileCase]]:
    """Every op's cases, with the op's name."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name == "targets":
            continue
        cases = getattr(importlib.import_module(f"{__package__}.{module.name}"), "compile_cases", None)
        if cases is not None:
            yield from ((module.name, case) for case in cases())


def source_of(op: str, case: CompileCase) -> ASTSource:
    """Triton's source object for a case."""
    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.types) | set(case.constants))
    if missing:
        raise ValueError(f"{op} {case.name}: arguments {sorted(missing)} do not match the kernel's")
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = dict(case.constants)
    attributes = {}
    for name, kind in case.types.items():
        place = names.index(name)
        # an element of a tuple is found by two numbers
        parts = {(place, i): part for i, part in enumerate(kind)} if isinstance(kind, tuple) else {(place,): kind}
        constants |= {path: None for path, part in parts.items() if part == "constexpr"}
        aligned = [path for path, part in parts.items() if part.startswith("*") or name in case.aligned]
        attributes |= {path: [["tt.divisibility", 16]] for path in aligned}
    return ASTSource(case.kernel, signature, constants, attributes)


def compile_case(op: str, case: CompileCase, architecture: int, folder: Path | None = None) -> Compiled:
    """Compile one case to a cubin, kept in ``folder``, for one architecture; errors of the compiler pass through."""
    compiled = triton.compile(source_of(op, case), target=GPUTarget("cuda", architecture, 32), options=case.options)
    cubin = compiled.asm["cubin"]
    registers, local = resource_usage(cubin)
    kept = None
    if folder is not None:
        kept = folder / (re.sub(r"\W", "_", f"{op}-{case.kernel.__name__}-{case.name}-sm_{architecture}") + ".cubin")
        kept.write_bytes(cubin)
    return Compiled(
        op,
        case.kernel.__name__,
        case.name,
        architecture,
        32 * compiled.metadata.num_warps,
        len(cubin),
        compiled.metadata.shared,
        registers,
        local,
        kept and str(kept),
    )


def resource_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack and local memory a thread, or Nones if Triton has no cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def plan(full: bool = False) -> Iterator[tuple[str, CompileCase, int]]:
    """The op, case and architecture of everything to compile."""
    covered = set()
    for op, case in all_cases():
        for architecture in case.architectures:
            kernel = op, case.kernel.__name__, architecture
            if full or architecture == HOPPER or kernel not in covered:
                yield op, case, architecture
            covered.add(kernel)


def amd_cases() -> Iterator[dict[str, Any]]:
    """Each kernel's first case that such a GPU launches, compiled; the cases before it, with the reason against them.

    ``gradients.architecture`` takes a GPU that is not NVIDIA's for one with compute capability 8.0.
    """
    covered = set()
    for op, case in all_cases():
        told = {"op": op, "kernel": case.kernel.__name__, "name": case.name, "target": AMD.arch}
        if any(str(kind).startswith("tensordesc") for kind in case.types.values()):
            yield {**told, "skipped": NO_DESCRIPTORS}
        elif (op, case.kernel.__name__) not in covered and 80 in case.architectures:
            covered.add((op, case.kernel.__name__))
            compiled = triton.compile(source_of(op, case), target=AMD, options=case.options)
            use = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", compiled.asm["amdgcn"])}
            yield {
                **told,
                "threads": AMD.warp_size * compiled.metadata.num_warps,
                "hsaco_bytes": len(compiled.asm["hsaco"]),
                "shared_bytes": compiled.metadata.shared,
                "registers": use["vgpr_count"],
                "spilled_registers": use["vgpr_spill_count"],
                "local_bytes": use["private_segment_fixed_size"],
            }


def main() -> None:
    """Print one JSON object a line for every kernel, case and architecture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--full", action="store_true", help="compile every case for every architecture")
    parser.add_argument("--cubins", type=Path, help="a folder to keep the cubins in")
    parser.add_argument("--op", action="append", help="only these ops")
    parser.add_argument("--amd", action="store_true", help="compile for gfx942, one case of each kernel")
    options = parser.parse_args()
    if options.amd:
        for told in amd_cases():
            if not options.op or told["op"] in options.op:
                print(json.dumps(told), flush=True)
        return
    for op, case, architecture in plan(options.full):
        if not options.op or op in options.op:
            print(json.dumps(asdict(compile_case(op, case, architecture, options.cubins))), flush=True)


if __name__ == "__main__":
    main()
