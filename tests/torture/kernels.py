"""Hands damaged packed weights to the kernels: refused, or multiplied right; never read past the end.

It runs in a process of its own under the address and undefined-behaviour sanitizers if their build is there (``make
sanitize``), which end it at the first wrong access.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.harness import Report, workplace

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = ROOT / "build" / "sanitize" / "lib"
CASES = 20_000
# formats whose mutations are read under the sanitizers too, and how many of each
FILES = {
    "from_pretrained: no hashes, and a call": 1500,
    "from_pretrained: packed weights": 500,
    "model.safetensors: packed": 1000,
    "level database: tensors": 1000,
    "tokens.safetensors": 1000,
    "stream.arrow": 500,
    "text.parquet": 500,
}
PATTERNS = ("2:8", "1:4", "2:4", "0:8", "3:16", "5:32", "7:8", "1:16", "31:32")


def run(report: Report, seconds: float) -> None:
    environment, sanitized = _environment()
    report.notes["sanitizers"] = sanitized
    end = time.monotonic() + seconds
    for name, full in {"packed weights": CASES, **FILES}.items():
        report.part(name, full)
    _until(report, ["packed weights"], environment, sanitized, time.monotonic() + seconds / 3)
    # in one process, since under the sanitizers it takes seconds to begin
    _until(report, list(FILES), environment, sanitized, end)


def _until(report: Report, names: list[str], environment: dict[str, str], sanitized: bool, deadline: float) -> None:
    """Run parts in a process, and those that are left in another one if it crashes."""
    while left := {name: part for name in names if (part := report.parts[name]).done < part.asked}:
        seconds = max(deadline - time.monotonic(), 1.0)
        asked = json.dumps([(name, part.done, part.asked, seconds / len(left)) for name, part in left.items()])
        process = subprocess.run(
            [sys.executable, "-m", "torture.kernels", str(report.seed), asked],
            # not where another msp lies
            env=environment, cwd=ROOT / "tests", capture_output=True, text=True, timeout=seconds + 200,
        )  # fmt: skip
        begun, *lines = [line for line in process.stdout.splitlines() if line.startswith(("[", "module "))] or [""]
        name = next(iter(left))
        if begun and sanitized and str(SANITIZED) not in begun:
            report.fail(name, "crash", f"{begun} is not of the sanitizers' build")
        for line in lines:
            name, verdict, why = json.loads(line)
            part, case = report.parts[name], report.parts[name].done
            part.done += 1
            if verdict in ("refused", "right", "read"):
                part.what[verdict] += 1
            elif verdict:
                report.fail(name, verdict, why, case=case, seed=report.seed)
            else:
                part.done -= 1  # the part begins
        if not process.returncode:
            return
        said = process.stderr[:900] + process.stderr[-900:]
        report.fail(name, "crash", said, case=report.parts[name].done, seed=report.seed)
        report.parts[name].done += 1
        if time.monotonic() > deadline:
            return


def _environment() -> tuple[dict[str, str], bool]:
    """As ``make sanitize`` has it; without its build as it is."""
    tests = str(ROOT / "tests")
    benchmarks = str(ROOT / "benchmarks")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not list(SANITIZED.glob("msp/_cpu*.so")) or compiler is None:
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), tests, benchmarks])}, False
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(SANITIZED), tests, benchmarks]),
    }, True


def main(seed: int, parts: list[tuple[str, int, int, float]]) -> None:
    """Run the cases of some parts, and print a verdict for each."""
    import msp._cpu

    print(f"module {msp._cpu.__file__} {msp._cpu.isa()}", flush=True)
    with contextlib.ExitStack() as stack:
        for name, first, stop, seconds in parts:
            case = try_case if name == "packed weights" else _file_case(stack, name)
            print(json.dumps([name, "", ""]), flush=True)
            deadline = time.monotonic() + seconds
            for number in range(first, stop):
                print(json.dumps([name, *case(seed, number)]), flush=True)
                if time.monotonic() > deadline:
                    break


def _file_case(stack: contextlib.ExitStack, name: str) -> Callable[[int, int], tuple[str, str]]:
    """As ``torture.mutations`` does it, in this process."""
    from torture.formats import every_format
    from torture.mutations import changed, judge, lay_out

    work = stack.enter_context(workplace())
    formats = every_format(work / "samples")
    form = next(each for each in formats if each.name == name)
    others, path = [each.sample for each in formats], lay_out(form, work / "work")
    right = form.read(path)
    return lambda seed, number: judge(form, changed(form, others, seed, number), path, right)


def try_case(seed: int, number: int) -> tuple[str, str]:
    """One weight, damaged or not, through the ops; what became of it."""
    import torch

    choose = random.Random(f"{seed}/kernels/{number}")

    from msp.errors import MspError
    from msp.formats.patterns import NMPattern
    from msp.ops import PackedWeight, nm_linear, nm_select, nm_unpack

    draw = torch.Generator().manual_seed(choose.randrange(1 << 40))
    pattern = NMPattern.parse(choose.choice(PATTERNS))
    rows, columns = choose.randint(1, 70), pattern.m * choose.randint(1, 12)
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16])
    weight = torch.randn(rows, columns, generator=draw).to(dtype)
    packed = nm_select(weight, pattern)
    values, bitmask, damage = damaged(packed.values, packed.bitmask, choose, draw)
    shape = (rows, columns)
    if choose.random() < 0.1:
        shape = (rows + choose.choice([-1, 0, 1, 1 << 20]), columns + choose.choice([0, 8, pattern.m, -pattern.m]))
    if choose.random() < 0.1:
        pattern = NMPattern.parse(choose.choice(PATTERNS))
    tokens = choose.choice([1, 1, 2, 3, 17, 64])
    x = torch.randn(tokens, columns, generator=draw).to(dtype)
    try:
        one = PackedWeight(values, bitmask, pattern, shape)
        product = nm_linear(x, one) if choose.random() < 0.7 else None
        dense = nm_unpack(one)
    except (MspError, ValueError, TypeError):
        return "refused", ""
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}; {damage}, {pattern}, {shape}"
    wanted = unpacked(values, bitmask, shape[1], pattern.n, pattern.m)
    if wanted is None:
        return "wrong", f"positions that do not fit were taken: {damage}, {pattern}, {shape}"
    if not torch.equal(dense.nan_to_num(7.0), wanted.nan_to_num(7.0)):
        return "wrong", f"unpacked wrongly: {damage}, {pattern}, {shape}"
    if product is not None and torch.isfinite(wanted).all():
        reference = x.double() @ wanted.double().T
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        room = bound * (x.double().abs() @ wanted.double().abs().T + 1)
        if not ((product.double() - reference).abs() <= room).all() and torch.isfinite(product).all():
            return "wrong", f"multiplied wrongly: {damage}, {pattern}, {shape}"
    return "right", ""


def damaged(values: Any, bitmask: Any, choose: random.Random, draw: Any) -> tuple[Any, Any, str]:
    """Other values or another bitmask, and what was done."""
    import torch

    values, bitmask, how = values.clone(), bitmask.clone(), choose.randrange(12)
    flat = bitmask.view(-1)
    at = choose.randrange(max(1, flat.numel()))
    if how == 0:
        return values, bitmask, "nothing"
    if how == 1:
        for _ in range(choose.randint(1, 3)):
            flat[choose.randrange(flat.numel())] ^= 1 << choose.randrange(8)
        return values, bitmask, "bits flipped"
    if how == 2:
        return values, torch.randint(0, 256, bitmask.shape, dtype=torch.uint8, generator=draw), "a random bitmask"
    if how == 3:
        flat[at:] = choose.choice([0, 255])
        return values, bitmask, "the end of the bitmask filled"
    if how == 4:
        return values[: choose.randint(0, len(values))], bitmask, "rows of values cut off"
    if how == 5:
        return values, bitmask[:, : choose.randint(0, bitmask.shape[1])], "columns of the bitmask cut off"
    if how == 6:
        return values[:, : choose.randint(0, values.shape[1])], bitmask, "columns of values cut off"
    if how == 7:
        return values.T, bitmask, "values transposed"
    if how == 8:
        return values, bitmask.to(choose.choice([torch.int8, torch.int32, torch.float32])), "bitmask of another dtype"
    if how == 9:
        other = choose.choice([torch.float64, torch.int32, torch.float16, torch.float32, torch.bfloat16])
        return values.to(other), bitmask, "values of another dtype"
    if how == 10:
        values.view(-1)[: choose.randint(0, values.numel())] = choose.choice([float("nan"), float("inf"), -0.0, 1e-40])
        return values, bitmask, "odd values"
    strided = torch.empty(*bitmask.shape, 2, dtype=torch.uint8)[..., 0]
    strided.copy_(bitmask)
    return values, strided, "a bitmask with gaps"


def unpacked(values: Any, bitmask: Any, columns: int, n: int, m: int) -> Any:
    """The dense weight by a plain loop; None where the positions are not ``n`` of every ``m``."""
    import torch

    if (
        len(values) != len(bitmask)
        or columns % m
        or values.shape[1] != columns // m * n
        or bitmask.shape[1] * 8 < columns
    ):
        return None
    bits = ((bitmask[:, :, None].to(torch.int32) >> torch.arange(8)) & 1).flatten(1)
    if bits[:, columns:].any():
        return None
    bits = bits[:, :columns].bool()
    if (bits.view(len(bits), columns // m, m).sum(-1) != n).any():
        return None
    dense = torch.zeros(len(bits), columns, dtype=values.dtype)
    for row in range(len(bits)):
        dense[row, bits[row]] = values[row]
    return dense


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
