"""How the C++ kernels are called, and what else they touch: unaligned, from many threads, after a fork, at a fence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from native_cases import BFLOAT16, DTYPES, SCALED, draw, make_case, make_factor, moved, native, prune, stored
from numpy.typing import NDArray

COLUMNS = 32 * 31
Arrays = tuple[NDArray[np.generic], ...]
# Given a dtype, a number of rows and how far to move every array in memory: the op as a function of its threads.
Prepare = Callable[[np.random.Generator, int, int, int], Callable[[int], Arrays]]


def select(rng: np.random.Generator, dtype: int, rows: int, shift: int) -> Callable[[int], Arrays]:
    case = make_case(rng, rows, COLUMNS, 8, 2, dtype, SCALED).moved(shift)
    return lambda threads: case.run(threads)[:2]


def rank(rng: np.random.Generator, dtype: int, rows: int, shift: int) -> Callable[[int], Arrays]:
    case = make_case(rng, rows, COLUMNS, 16, 2, dtype, SCALED).moved(shift)
    return lambda threads: case.run_rank(threads)[:1]


def keep(rng: np.random.Generator, dtype: int, rows: int, shift: int) -> Callable[[int], Arrays]:
    case = make_case(rng, rows, COLUMNS, 4, 2, dtype).moved(shift)
    ranks = moved(case.ranks(), shift)
    return lambda threads: (case.run_keep(ranks, 2, threads),)


def unpack(rng: np.random.Generator, dtype: int, rows: int, shift: int) -> Callable[[int], Arrays]:
    case = make_case(rng, rows, COLUMNS, 8, 3, dtype).moved(shift)
    return lambda threads: (case.run_unpack(threads),)


def linear(rng: np.random.Generator, dtype: int, rows: int, shift: int) -> Callable[[int], Arrays]:
    case = make_case(rng, rows, COLUMNS, 8, 3, dtype).moved(shift)
    x, bias = (moved(stored(draw(rng, *shape), dtype), shift) for shape in ((5, COLUMNS), (rows,)))
    return lambda threads: (case.run_linear(x, bias, threads),)


def obs(rng: np.random.Generator, dtype: int, rows: int, shift: int) -> Callable[[int], Arrays]:
    weight, factor = moved(draw(rng, rows, 32 * 9), shift), moved(make_factor(rng, 32 * 9), shift)
    return lambda threads: prune(weight, factor, 8, 2, threads, shift)


OPS = {
    "nm_select": select,
    "nm_rank": rank,
    "nm_keep": keep,
    "nm_unpack": unpack,
    "nm_linear": linear,
    "obs_prune": obs,
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def same(found: Arrays, wanted: Arrays) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, wanted, strict=True))


@every_op
def test_no_number_of_threads_changes_a_bit(isa: str, op: Prepare) -> None:
    for rows in (1, 211):
        run = op(np.random.default_rng(rows), BFLOAT16, rows, 0)
        alone = run(1)
        assert all(same(run(threads), alone) for threads in range(2, 9))


@every_op
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_addresses_need_no_alignment_beyond_the_element(isa: str, dtype: int, op: Prepare) -> None:
    for rows in (1, 13):
        aligned, moved = (op(np.random.default_rng(rows), dtype, rows, shift)(1) for shift in (0, 1))
        assert same(moved, aligned)


@every_op
def test_concurrent_callers(isa: str, op: Prepare) -> None:
    """The GIL is released: four threads of Python are in the kernel at once, each with threads of its own."""
    calls = [op(np.random.default_rng(seed), BFLOAT16, 130, 0) for seed in range(4)]
    wanted = [run(1) for run in calls]
    right = [0] * len(calls)

    def work(which: int) -> None:
        for _ in range(20):
            right[which] += same(calls[which](3), wanted[which])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [20] * len(calls)


def run_python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A crash in there is a failure here. Not in the current folder, whose ``msp`` would come before the installed."""
    code = code.format(tests=str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


FORKING = """
import os, sys
sys.path.insert(0, {tests!r})
if "torch" in sys.argv:
    import torch                            # brings the OpenMP runtime whose threads are used then
import numpy as np
from native_cases import make_case
case = make_case(np.random.default_rng(0), 257, 1024, 8, 2)
expected = case.run(4)                      # the pool's threads exist in the parent
child = os.fork()
if child == 0:
    values, bitmask, _ = case.run(4)        # and not in the child
    os._exit(0 if np.array_equal(values, expected[0]) and np.array_equal(bitmask, expected[1]) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_threads_after_fork(tmp_path: Path, library: str) -> None:
    if library == "torch" and "build/sanitize" in native.__file__:
        pytest.skip("torch is not built for the sanitizers")
    done = run_python(FORKING, tmp_path, library)
    assert done.returncode == 0, done.stderr


# A page that faults lies right behind (or before) each buffer.
GUARDED = """
import ctypes, mmap, sys
sys.path.insert(0, {tests!r})
import numpy as np
from native_cases import DTYPES, KINDS, make_case, native
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
held = []

def guarded(array, at_end):
    size = array.nbytes
    pages = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    held.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (base, base + mmap.PAGESIZE + pages):
        assert libc.mprotect(fence, mmap.PAGESIZE, 0) == 0
    start = base + mmap.PAGESIZE + (pages - size if at_end else 0)
    ctypes.memmove(start, array.ctypes.data, size)
    return start

rng = np.random.default_rng(int(sys.argv[1]))
for dtype in DTYPES.values():
    for kind in KINDS.values():
        for group_size in (4, 8, 16, 32):
            for columns in {{group_size, group_size * 3, group_size * 7}}:
                for at_end in (True, False):
                    case = make_case(rng, 3, columns, group_size, group_size // 2, dtype, kind)
                    expected = case.run()
                    values, bitmask = (guarded(np.zeros_like(out), at_end) for out in expected[:2])
                    scored = case.scored
                    for name, term in zip(list(scored)[-4:], case.terms):
                        scored[name] = 0 if term is None else guarded(term, at_end)
                    scored["weight_ptr"] = weight = guarded(case.stored, at_end)
                    native.nm_select(
                        **scored, n=case.n, compliant=False, values_ptr=values, bitmask_ptr=bitmask, threads=1)
                    for address, out in zip((values, bitmask), expected):
                        assert ctypes.string_at(address, out.nbytes) == out.tobytes()
                    ranks = case.run_rank()[0]
                    rank, kept = guarded(np.zeros_like(ranks), at_end), guarded(np.zeros_like(case.stored), at_end)
                    native.nm_rank(**scored, rank_ptr=rank, threads=1)
                    native.nm_keep(weight, rank, kept, dtype, case.stored.size, case.n, 1)
                    expected = ranks, case.run_keep(ranks, case.n)
                    for address, out in zip((rank, kept), expected):
                        assert ctypes.string_at(address, out.nbytes) == out.tobytes()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages the Linux way")
def test_touches_nothing_outside_its_buffers(isa: str, tmp_path: Path) -> None:
    done = run_python(GUARDED, tmp_path, "11")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
