"""The one measuring method of every CPU benchmark: msp's call and its peers, the error in the same row.

A benchmark is a pytest-benchmark test that ends in ``measure``::

    pytest benchmarks/bench_nm_linear.py --benchmark-json out.json

``python benchmarks/runner.py out.json`` prints the rows of such a file; ``--save`` also writes them, with commit,
versions and machine, to ``benchmarks/results/cpu-<machine>-<date>.json`` (those of the search to ``search-...``),
and the tables of docs/cpu.md and docs/search-notebook.md from the newest of every machine. ``make bench`` does all
of it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The page in docs/ with the table of each kind of benchmark.
PAGES = {"cpu": "cpu.md", "search": "search-notebook.md"}
Call = Callable[[], object]
# Counted calls of one turn.
TURN = 5


def measure(
    benchmark: Any,
    ours: Call,
    peers: dict[str, Call],
    *,
    error: float,
    bound: float,
    moved: int | None = None,
    flops: int | None = None,
    seconds: float = 2.0,
) -> None:
    """Time ``ours`` and the peers in turn, so that a disturbance of the machine affects all of them.

    A turn is a few calls in a row, and the first is not counted: threads that slept during the others' turns are awake
    afterwards, as they are between the layers of a model.

    Args:
        benchmark: pytest-benchmark's fixture; its own statistics are of ``ours``.
        ours, peers: calls without arguments; inputs should rotate through more memory than the caches hold.
        error: the error of ``ours`` against a better computation; above ``bound`` no speed is reported.
        moved: bytes that must move, for GB/s and the share of the read bandwidth. The bandwidth is measured in turn
            too, because other load on the host can halve it.
        flops: operations, for GFLOP/s.
        seconds: the approximate time for which the slowest call is repeated.
    """
    if not error <= bound:
        raise AssertionError(f"an error of {error:.2g} is above {bound:.2g}: no speed is worth reporting")
    calls = {"ours": ours, **peers}
    for call in calls.values():
        call()
    slowest = max(seconds_of(call) for call in calls.values())
    counted = TURN if slowest < seconds / TURN else 1
    turns = max(2, min(12, int(seconds / slowest / counted)))
    if moved is not None:
        calls["read"], bytes_read = reader()
    samplers = {name: functools.partial(seconds_of, call) for name, call in calls.items()}
    times = take_turns(samplers, turns, counted=counted, uncounted=1)
    benchmark.pedantic(ours, rounds=counted, iterations=1)
    medians = {name: statistics.median(values) for name, values in times.items()}
    row: dict[str, Any] = {"median_seconds": medians["ours"], "error": error, "bound": bound}
    row["ratio"] = {name: medians[name] / medians["ours"] for name in peers}
    if moved is not None:
        row["gb_per_second"] = moved / medians["ours"] / 1e9
        row["of_read_bandwidth"] = row["gb_per_second"] / (bytes_read / medians["read"] / 1e9)
    if flops is not None:
        row["gflop_per_second"] = flops / medians["ours"] / 1e9
    benchmark.extra_info.update(row)


def take_turns(
    samplers: dict[str, Callable[[], float]], turns: int, *, counted: int = 1, uncounted: int = 0
) -> dict[str, list[float]]:
    """The counted samples of each, taken in turn: a disturbance of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(turns):
        for name, sample in samplers.items():
            times[name] += [sample() for _ in range(uncounted + counted)][uncounted:]
    return times


def seconds_of(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@functools.cache
def native_peers() -> ctypes.CDLL:
    """``native/peers.cpp``, compiled for this machine."""
    folder = Path(tempfile.mkdtemp(prefix="msp-bench-"))
    target = folder / "peers.so"
    compiler = os.environ.get("CXX", "g++")
    sources = [ROOT / "benchmarks" / "native" / "peers.cpp", ROOT / "csrc" / "cpu" / "parallel.cpp"]
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.read_words.restype = ctypes.c_uint64
    library.has_dense_gemv.restype = ctypes.c_bool
    library.multiply_add.restype = ctypes.c_bool
    return library


@functools.cache
def reader() -> tuple[Call, int]:
    """A call that reads the next part of 1 GiB on torch's number of threads, and the bytes of a part.

    A part has the size of a weight, so it is read as fast.
    """
    import torch

    parts = torch.randint(1 << 62, (1 << 27,)).split(1 << 22)
    turns = itertools.cycle(parts)

    def read() -> None:
        part = next(turns)
        pointer, count = ctypes.c_void_p(part.data_ptr()), ctypes.c_int64(part.numel())
        native_peers().read_words(pointer, count, torch.get_num_threads())

    return read, parts[0].nbytes


@functools.cache
def read_bandwidth() -> float:
    """GB/s at which torch's number of threads reads memory that is in no cache.

    It is the median over parts: a machine that pauses for some milliseconds from time to time slows down only a few of
    the parts, but would slow down every long read.
    """
    read, bytes_read = reader()
    times = [seconds_of(read) for _ in range(128)]
    return bytes_read / statistics.median(times[32:]) / 1e9


def products_from_registers(count: int) -> Call | None:
    """A call that multiplies and adds in fp32 ``count`` times on torch's number of threads, out of registers.

    No computation with this number of products takes less time. None without AVX-512.
    """
    import torch

    library = native_peers()

    def call() -> None:
        library.multiply_add(ctypes.c_int64(count), torch.get_num_threads())

    return call if library.multiply_add(ctypes.c_int64(0), 1) else None


def commit() -> str:
    """The commit of the measured code."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """The conditions of a figure: processor, instruction set, threads, versions, commit."""
    import torch

    import msp
    from msp import _cpu

    return {
        "commit": commit(),
        "processor": processor(),
        "isa": _cpu.isa(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "read_gb_per_second": read_bandwidth(),
        "versions": {"msp": msp.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a pytest-benchmark JSON report, by the names of their tests."""
    return [{"name": entry["name"], **entry["extra_info"]} for entry in report["benchmarks"] if entry["extra_info"]]


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown of rows."""
    lines = ["| what | median | GB/s | of read bandwidth | error | against |", "|---|---|---|---|---|---|"]
    for row in entries:
        rate = f"{row['gb_per_second']:.1f}" if "gb_per_second" in row else ""
        share = f"{row['of_read_bandwidth']:.0%}" if "of_read_bandwidth" in row else ""
        against = ", ".join(f"{name} **{ratio:.2f}x**" for name, ratio in row["ratio"].items())
        median = f"{row['median_seconds'] * 1e3:.3f} ms"
        lines.append(f"| {row['name']} | {median} | {rate} | {share} | {row['error']:.1e} | {against} |")
    return "\n".join(lines) + "\n"


def search_table(entries: list[dict[str, Any]]) -> str:
    """Markdown of the rows of ``bench_search.py``, and below it of ``bench_search_workers.py``."""
    searches = [row for row in entries if "share" in row]
    workers = [row for row in entries if "share" not in row]
    if not searches:
        return table(workers)
    first = searches[0]
    shares = list(first["share"])
    head = ["what", "candidates/s", "tokens/s", *first["ratio"], *(f"share of {name}" for name in shares), "error"]
    lines = [head, ["---"] * len(head)]
    for row in searches:
        rates = [f"{row['candidates_per_second']:.2f}", f"{row['tokens_per_second']['ours']:,.0f}"]
        peers = [f"{row['tokens_per_second'][name]:,.0f} (**{ratio:.2f}x**)" for name, ratio in row["ratio"].items()]
        lines.append(
            [row["name"], *rates, *peers, *(f"{row['share'][name]:.1%}" for name in shares), f"{row['error']:.1e}"]
        )
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text + ("\n" + table(workers) if workers else "")


def machine_name(processor: str) -> str:
    """``Intel(R) Xeon(R) Processor`` -> ``intel-xeon``, for the name of a file."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(\w+\)|@.*|\b(processor|cpu)\b", "", processor.lower()))
    return "-".join(words) or "unknown"


def save(where: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write the results files of this machine and day, and the tables of the pages from the newest of every machine."""
    from msp.base.files import write_text

    for kind, wanted in (("cpu", False), ("search", True)):
        mine = [row for row in entries if ("candidates_per_second" in row) == wanted]
        if mine:
            name = f"{kind}-{machine_name(where['processor'])}-{datetime.date.today().isoformat()}.json"
            content = json.dumps({"machine": where, "rows": mine}, indent=1) + "\n"
            write_text(RESULTS / name, content)
            write_table(ROOT / "docs" / PAGES[kind], kind, tables(kind))


def write_table(page: Path, name: str, text: str) -> None:
    """Write ``text`` between the comments of a Markdown page that name the table."""
    from msp.base.files import write_text

    start, end = f"<!-- table:{name} -->\n", f"<!-- /table:{name} -->"
    before, rest = page.read_text(encoding="utf-8").split(start, 1)
    write_text(page, before + start + text + end + rest.split(end, 1)[1])


def tables(kind: str) -> str:
    """A headline and a table for every machine with results of the ``cpu`` or the ``search``."""
    newest: dict[str, Path] = {}
    for path in sorted(RESULTS.glob(f"{kind}-*-????-??-??.json")):
        newest[path.stem[: -len("-2026-01-01")]] = path
    parts = []
    for path in newest.values():
        result = json.loads(path.read_text(encoding="utf-8"))
        where = result["machine"]
        told = (
            f"{where['processor']}, `{where['isa']}`, {where['threads']} threads, read bandwidth "
            f"{where['read_gb_per_second']:.1f} GB/s, torch {where['versions']['torch']}, commit {where['commit']}, "
            f"`benchmarks/results/{path.name}`:\n\n"
        )
        parts.append(told + (search_table if kind == "search" else table)(result["rows"]))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="+", help="JSON files of pytest-benchmark")
    parser.add_argument("--save", action="store_true", help="write the results file and the table of docs/cpu.md")
    options = parser.parse_args()
    entries: list[dict[str, Any]] = []
    for path in options.report:
        entries += rows(json.loads(path.read_text()))
    sys.stdout.write(table(entries))
    if options.save:
        save(machine(), entries)


if __name__ == "__main__":
    main()
