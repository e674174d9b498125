"""Reads compiled GPU kernels: what each takes of a multiprocessor and which instructions it is made of.

``read_kernels`` takes anything ``cuobjdump`` does, the built ``msp._cuda`` or a bare cubin; no GPU is needed. A test
asks for the fixture ``cuda_kernels`` and looks at the ones whose ``family`` is its kernel's name::

    for kernel in family(cuda_kernels, "nm_select_kernel"):
        assert not kernel.spilled
        assert kernel.count("LDG", 128) >= 2
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: CUDA C++ Programming Guide, technical specifications per compute capability."""

    shared_bytes: int
    warps: int
    blocks: int
    registers: int = 65536
    # the granule in which a warp gets registers
    warp_registers: int = 256


# Of each block's shared memory the driver keeps so many bytes. From sm_90 on, cuobjdump counts them as the kernel's.
RESERVED_SHARED_BYTES = 1024
LIMITS = {
    80: Limits(164 << 10, 64, 32),
    86: Limits(100 << 10, 48, 16),
    89: Limits(100 << 10, 48, 24),
    90: Limits(228 << 10, 64, 32),
    100: Limits(228 << 10, 64, 32),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target.

    Attributes:
        target: ``sm_90a``.
        name: demangled, without namespaces, return type and arguments: ``nm_select_kernel<2, 32, 4>``.
        threads: most threads of a block, as ``__launch_bounds__`` says; 0 where it does not.
        registers, stack, local: a thread's; stack and local in bytes. ``shared``: static bytes of a block.
        sequence: full opcodes, like ``LDG.E.128.CONSTANT``, in their order.
    """

    target: str
    name: str
    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    sequence: tuple[str, ...]

    @property
    def instructions(self) -> Counter[str]:
        """Full opcode -> how often."""
        return Counter(self.sequence)

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the template, enumerators as their numbers."""
        inner = self.name.partition("<")[2].removesuffix(">")
        return tuple(part.strip() for part in inner.split(",")) if inner else ()

    @property
    def capability(self) -> int:
        return _capability(self.target)

    @property
    def spilled(self) -> bool:
        return bool(self.stack or self.local or self.count("LDL") or self.count("STL"))

    def count(self, opcode: str, *modifiers: str | int) -> int:
        """Instructions of ``opcode`` with all of the modifiers: ``count("LDG", 128)``, ``count("HMMA", "SP")``."""
        wanted = {str(modifier) for modifier in modifiers}
        return sum(
            times
            for instruction, times in self.instructions.items()
            if instruction.split(".")[0] == opcode and wanted <= set(instruction.split(".")[1:])
        )

    def blocks(self, threads: int = 0, dynamic_shared: int = 0) -> int:
        """How many blocks of ``threads`` (default: the most of a block) one multiprocessor holds at a time."""
        limits = LIMITS[self.capability]
        warps = -(-(threads or self.threads) // 32)
        granule = limits.warp_registers
        registers = -(-self.registers * 32 // granule) * granule * warps
        shared = self.shared + dynamic_shared + RESERVED_SHARED_BYTES
        return min(limits.blocks, limits.warps // warps, limits.registers // registers, limits.shared_bytes // shared)


def family(kernels: Iterable[Kernel], name: str) -> list[Kernel]:
    """The kernels of that name; an assertion fails where there are none, lest a test passes on nothing."""
    found = [kernel for kernel in kernels if kernel.family == name]
    assert found, f"no kernel is called {name}"
    return found


def find_tool(name: str) -> str | None:
    """``cuobjdump`` or ``nvdisasm``: the CUDA toolkit's, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    candidates = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    if triton is not None and triton.submodule_search_locations:
        candidates.append(f"{triton.submodule_search_locations[0]}/backends/nvidia/bin/{name}")
    return next((path for path in candidates if path and Path(path).is_file()), None)


def cuda_module() -> Path | None:
    """The built ``msp._cuda``."""
    spec = importlib.util.find_spec("msp._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def use_module(path: Path) -> None:
    """``msp._cuda`` is that file from here on, for all of this process."""
    import msp

    spec = importlib.util.spec_from_file_location("msp._cuda", path)
    assert spec and spec.loader, f"{path} is no compiled module"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["msp._cuda"] = msp._cuda = module


@functools.cache
def dump(what: str, path: Path) -> str:
    """``cuobjdump --dump-<what>``."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("neither the CUDA toolkit nor Triton brings cuobjdump")
    return subprocess.run([tool, f"--dump-{what}", str(path)], capture_output=True, text=True, check=True).stdout


@functools.cache
def read_kernels(path: Path) -> tuple[Kernel, ...]:
    """Every kernel in a shared object or cubin, for every target it has machine code for."""
    sass = dump("sass", path)
    # a bare cubin has one target, which the other dumps do not tell
    target = re.search(r"code for (sm_\w+)", sass)
    only = target[1] if target else ""
    sequences = {
        key: tuple(INSTRUCTION.findall(text)) for key, text in _by_function(sass, only, r"\s*Function : (\S+)")
    }
    threads = {
        key: int(match[1], 16)
        for key, text in _by_function(dump("elf", path), only, r"\.nv\.info\.(\S+)$")
        if (match := re.search(r"EIATTR_(?:MAX_THREADS|REQNTID).*?Value:\s+0x([0-9a-f]+)", text, re.DOTALL))
    }
    uses = list(_by_function(dump("resource-usage", path), only, r"\s*Function (\S+):"))
    names = _plain_names(symbol for (_, symbol), _ in uses)
    kernels = []
    for key, text in uses:
        use = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        target, symbol = key
        if _capability(target) >= 90:
            use["SHARED"] = max(0, use["SHARED"] - RESERVED_SHARED_BYTES)
        kernels.append(
            Kernel(
                target,
                names.get(symbol, symbol),
                threads.get(key, 0),
                use["REG"],
                use["STACK"],
                use["LOCAL"],
                use["SHARED"],
                sequences[key],
            )
        )
    return tuple(kernels)


def _capability(target: str) -> int:
    return int(re.sub(r"\D", "", target))


def _by_function(text: str, target: str, function: str) -> Iterator[tuple[tuple[str, str], str]]:
    """``(target, symbol)`` and what stands below the line that ``function`` matches; ``target`` until one is named."""
    key, start = None, 0
    for match in re.finditer(rf"^(?:arch = (sm_\w+)|{function})$", text, re.MULTILINE):
        if key is not None:
            yield key, text[start : match.start()]
        target = match[1] or target
        key, start = None if match[1] else (target, match[2]), match.end()
    if key is not None:
        yield key, text[start:]


def _plain_names(symbols: Iterable[str]) -> dict[str, str]:
    """``void msp::(anonymous namespace)::select_kernel<(msp::Dtype)2, 32>(msp::Op)`` -> ``select_kernel<2, 32>``."""
    mangled = sorted({symbol for symbol in symbols if symbol.startswith("_Z")})
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not mangled or tool is None:
        return {}
    told = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, name in zip(mangled, told.splitlines(), strict=True):
        name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        name = re.sub(r"\([\w:]+\)(?=-?\d)", "", name)  # the type of an enumerator
        head, bracket, arguments = name.partition("(")[0].partition("<")
        names[symbol] = head.split("::")[-1] + bracket + arguments
    return names
