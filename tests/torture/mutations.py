"""Reads damaged files of every format in this process, with limits on time and memory.

Each must be read as what it says, or refused by ``MspError``. Anything else fails: another error, a crash, more than
five seconds, more than 1 GB of memory, or another content than the file's. Batches run in forked processes, so that a
crash is counted and the rest goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import select
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msp.errors import MspError
from torture.formats import SAME, Format, every_format
from torture.harness import Report, Shares, kill, limit_memory, start, wait, workplace
from torture.mutators import as_json, damaged, reshaped

CASE_SECONDS = 5.0
CASE_BYTES = 1 << 30
# Address space that is not used is no memory: threads and their heaps reserve 128 MB each.
SPACE_BYTES = 3 << 30
BATCH = 400


def run(report: Report, seconds: float) -> None:
    with workplace() as work:
        formats = every_format(work / "samples")
        others = [each.sample for each in formats]
        shares = Shares(seconds, len(formats) + 1)
        for each in sorted(formats, key=lambda each: -each.full):
            try_format(report, each, others, work / "work", shares.next())
        structures(report, formats, work / "work", shares.next())
    report.notes["limits"] = {"seconds": CASE_SECONDS, "bytes": CASE_BYTES}


def changed(form: Format, others: list[bytes], seed: int, number: int) -> bytes:
    """The file of a case, the same whenever it is asked for."""
    choose = random.Random(f"{seed}/{form.name}/{number}")
    if form.change is not None:
        return form.change(form.sample, choose)
    if form.shape and choose.random() < 0.6:
        return written(form, choose)
    return damaged(form.sample, choose.choice(others), choose)


def written(form: Format, choose: random.Random) -> bytes:
    import yaml

    if form.shape == "json":
        return as_json(reshaped(json.loads(form.sample), choose))
    content = reshaped(yaml.safe_load(form.sample), choose)
    try:
        return yaml.safe_dump(content).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return as_json(content)  # which is YAML as well


def lay_out(form: Format, folder: Path) -> Path:
    for name, data in form.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / form.target


def judge(form: Format, data: bytes, path: Path, right: Any) -> tuple[str, str]:
    """What became of a file: ``read``, ``refused``, or a kind of failure and why.

    Args:
        right: what the unchanged file is read as.
    """
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = form.read(path)
    except MspError as error:
        if any(isinstance(cause, MemoryError) or "not enough memory" in str(cause) for cause in causes(error)):
            return "memory", traceback.format_exc()
        return "refused", ""
    except BaseException:  # Rust panics are none of Exception's
        return "traceback", traceback.format_exc()
    if data == form.sample or form.expected == SAME:
        return ("read", "") if found == right else ("wrong", "is not what the unchanged file holds")
    if form.expected is None:
        return "read", ""
    assert callable(form.expected)
    try:
        wanted = form.expected(data)
    except Exception as error:
        return "wrong", f"read as {str(found)[:300]}, but is to be refused: {type(error).__name__}: {error}"
    return ("read", "") if same(found, wanted) else ("wrong", f"read as {str(found)[:300]}, but is {str(wanted)[:300]}")


def same(found: Any, wanted: Any) -> bool:
    """Equal, and true is not 1."""
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict) and found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
        )
    if isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted) and isinstance(found, bool) == isinstance(wanted, bool)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def try_format(report: Report, form: Format, others: list[bytes], work: Path, deadline: float) -> None:
    part = report.part(form.name, form.full)

    def case(number: int, path: Path, right: Any) -> tuple[str, str]:
        return judge(form, form.sample if number < 0 else changed(form, others, report.seed, number), path, right)

    began = time.monotonic()
    in_batches(report, form.name, form, case, work, deadline)
    part.notes["milliseconds"] = round(1000 * (time.monotonic() - began) / max(1, part.done), 2)


def in_batches(
    report: Report,
    name: str,
    form: Format,
    case: Callable[[int, Path, Any], tuple[str, str]],
    work: Path,
    deadline: float,
) -> None:
    """Run the cases of a part from its number 0 on, a batch in a process."""
    part = report.parts[name]
    while part.goes_on(deadline):
        first = part.done
        reader, writer = os.pipe()
        stop = min(first + BATCH, part.asked)

        def batch(first: int = first, stop: int = stop, reader: int = reader, writer: int = writer) -> None:
            os.close(reader)
            _batch(form, case, work, range(first, stop), writer, deadline)

        child = start(batch, work.with_suffix(".said"))
        os.close(writer)
        _follow(report, name, child, reader, stop)
        os.close(reader)
        if part.done == first:  # the unchanged file itself is not read
            said = work.with_suffix(".said.err").read_text()
            report.fail(name, "crash", f"no case was begun: {said}")
            return


def _batch(form: Format, case: Any, work: Path, numbers: range, writer: int, deadline: float) -> None:
    folder = work / str(os.getpid())
    path = lay_out(form, folder)
    right = form.read(path)
    os.write(writer, b"begun\n")
    limit_memory(SPACE_BYTES)
    for number in numbers:
        if number > numbers.start and time.monotonic() > deadline:
            break
        before = _peak_from_here()
        verdict, why = case(number, path, right)
        more = _peak() - before
        if more > CASE_BYTES:
            verdict, why = "memory", f"{more:,} bytes more"
        os.write(writer, (json.dumps([verdict, why[-1500:]]) + "\n").encode())


def _peak_from_here() -> int:
    """The most memory of this process in bytes, counted anew from now on where the system can.

    What was freed since the old peak would hide as much that a case takes.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _follow(report: Report, name: str, child: int, reader: int, stop: int) -> None:
    """Count what a batch says of its cases, and how it ends."""
    part, data, begun = report.parts[name], b"", False
    hung = False
    while True:
        if not select.select([reader], [], [], CASE_SECONDS if begun else 60.0)[0]:
            hung = True
            break
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        *lines, data = (data + piece).split(b"\n")
        for line in lines:
            if line == b"begun":
                begun = True
                continue
            verdict, why = json.loads(line)
            _count(report, name, verdict, why)
    code = None if hung else wait(child, 10.0)
    if code is None:
        kill(child)
    if hung and begun:
        _count(report, name, "hang", f"no answer in {CASE_SECONDS} s")
    elif code and begun and part.done < stop:
        _count(report, name, "crash", f"exit code {code}")


def _count(report: Report, name: str, verdict: str, why: str) -> None:
    part = report.parts[name]
    if verdict in ("read", "refused"):
        part.what[verdict] += 1
    else:
        report.fail(name, verdict, why, case=f"{name}:{part.done}", seed=report.seed)
    part.done += 1


def structures(report: Report, formats: list[Format], work: Path, deadline: float) -> None:
    """JSON of any structure, drawn by hypothesis, through every reader of JSON."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    readers = [form for form in formats if form.shape == "json" and form.full >= 3000 and form.name != MARKED]
    for number, form in enumerate(readers):
        keys = st.sampled_from(sorted(_keys(json.loads(form.sample)))) | st.text(max_size=5)
        values = st.recursive(
            scalars, lambda inner, keys=keys: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)
        )
        name = f"{form.name}: any JSON"
        part = report.part(name, 300)
        drawn: list[bytes] = []

        @seed(report.seed + number)
        @settings(
            max_examples=part.asked, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(values)
        def draw(value: Any) -> None:
            drawn.append(json.dumps(value).encode())  # noqa: B023

        draw()
        part.asked = min(part.asked, len(drawn))

        def case(number: int, path: Path, right: Any, form: Format = form, drawn: list[bytes] = drawn) -> Any:
            return judge(form, drawn[number], path, right)

        in_batches(report, name, form, case, work, deadline)


MARKED = ".msp-output.json"


def _keys(content: Any) -> set[str]:
    if isinstance(content, dict):
        return set(content).union(*map(_keys, content.values()))
    return set().union(*map(_keys, content)) if isinstance(content, list) else {"x"}


def show(case: str, seed: int) -> int:
    """Print what the file of a case holds and what became of it; 1 if that is a failure."""
    name, _, number = case.rpartition(":")
    with workplace() as work:
        formats = every_format(work / "samples")
        form = next(each for each in formats if each.name == name)
        data = changed(form, [each.sample for each in formats], seed, int(number))
        path = lay_out(form, work / "work")
        right = form.read(path)
        print(f"{len(data)} bytes, {len(form.sample)} before; differ from byte {_first_difference(data, form.sample)}")
        print(data[:3000])
        verdict, why = judge(form, data, path, right)
        if verdict == "refused":
            with contextlib.suppress(MspError):
                form.read(path)
        print(verdict, why)
    return 0 if verdict in ("read", "refused") else 1


def _first_difference(one: bytes, other: bytes) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
