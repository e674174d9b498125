"""Fills the disk: with so many bytes left, a command ends well, or its error names the file and OUT is as it was.

The disk is a tmpfs in a mount namespace of its own, and another file fills it up but for so many bytes. Where no file
system may be mounted, files may not grow beyond that size instead (``RLIMIT_FSIZE``); the results file says which.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from families import packed_model, save, save_text, tokenizer
from killing import bytes_below

from msp.base.files import write_text
from msp.base.outputs import write_results
from msp.errors import MspError
from msp.packed.checkpoint import save_packed
from msp.text.token_sets import save_tokens
from torture.harness import Report, Shares, command, forked, start, wait, workplace
from torture.kills import SEARCH, SMALL

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
DISK_BYTES = 16 << 20
SECONDS = 120

# What is run, and what it writes below the disk. Sizes are tried from nothing to enough for all.
COMMANDS: dict[str, tuple[list[str], int, int]] = {
    "prune": (["prune", "model", "-o", "{disk}/out", "--force", *SEARCH], 400_000, 60),
    "prune, streamed": (["prune", "model", "-o", "{disk}/out", "--force", "--stream", *SEARCH], 600_000, 40),
    "prune, a database on the disk": (
        ["prune", "model", "-o", "{disk}/out", "--force", "--pruner", "sparsegpt", *SEARCH], 900_000, 40,
    ),
    "search": (["search", "model", "-o", "{disk}/found", *SEARCH], 60_000, 30),
    "search, several budgets": (["search", "model", "-o", "{disk}/found", "-s", "0.5,0.75", *SEARCH], 240_000, 30),
    "compare": (
        ["compare", "model", "-o", "{disk}/table.png", "--allocators", "uniform", "--seeds", "1", *SMALL], 40_000, 15,
    ),
    "hidden states": (
        ["prune", "model", "-o", "out", "--stream", "--hidden-bytes", "4kB", "--no-pictures", *SEARCH], 200_000, 30,
    ),
    "export": (["export", "packed", "--dense", "-o", "{disk}/out", "--force", "--json"], 200_000, 25),
}  # fmt: skip


def run(report: Report, seconds: float) -> None:
    draw = random.Random(f"{report.seed}/disk")
    shares = Shares(seconds, len(COMMANDS) + 1)
    with workplace() as home:
        save("llama", home / "model")
        save_text(home / "text.txt", 7)
        for name, family in (("packed", "llama"), ("other", "qwen2")):
            save_packed(packed_model(family), tokenizer(), home / name, recipe={})
        (home / "disk").mkdir()
        mounted = forked(lambda: mount(home / "disk"), 20)
        report.notes["full_by"] = "tmpfs" if mounted.code == 0 else "RLIMIT_FSIZE"
        on_disk = mounted.code == 0
        direct(report, home, on_disk, shares.next(), draw)
        for name, (arguments, enough, full) in COMMANDS.items():
            part, deadline, number = report.part(name, full), shares.next(), 0
            while part.goes_on(deadline):
                # evenly from nothing to enough, each a little beside its place
                room = int((number + draw.random()) / part.asked * enough)
                number += 1
                case = forked(lambda: one_command(home, name, arguments, room, on_disk), SECONDS)  # noqa: B023
                _judge(report, name, case, room)


def mount(disk: Path) -> None:
    """A tmpfs at ``disk`` that only this process and those it starts see; ``OSError`` where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), name)

    if os.geteuid():
        ids = os.getuid(), os.getgid()
        call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {ids[0]} 1")
        Path("/proc/self/gid_map").write_text(f"0 {ids[1]} 1")
    else:
        call("unshare", CLONE_NEWNS)
    call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    call("mount", b"torture", os.fsencode(disk), b"tmpfs", ctypes.c_ulong(0), b"size=%d" % DISK_BYTES)


def fill(disk: Path, room: int, on_disk: bool) -> None:
    """Leave ``room`` bytes on the disk, or in a file."""
    if not on_disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return
    size = shutil.disk_usage(disk).free - room // 4096 * 4096
    if size > 0:
        with (disk / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def one_command(home: Path, name: str, arguments: list[str], room: int, on_disk: bool) -> tuple[str, str]:
    """Runs it with an old result on a full disk; what became of it."""
    disk, work = home / "disk", home / f"run-{os.getpid()}"
    (work / "tmp").mkdir(parents=True)
    for link in ("model", "text.txt", "packed"):
        (work / link).symlink_to(home / link)
    if on_disk:
        mount(disk)
    (disk / "tmp").mkdir()
    if "{disk}/out" in arguments:
        if name == "export":
            import msp

            msp.export_dense(home / "other", disk / "out")
        else:
            save_packed(packed_model("qwen2"), tokenizer(), disk / "out", recipe={"of": "old"})
    before = bytes_below(disk)
    fill(disk, room, on_disk)
    temporary = disk / "tmp" if name == "hidden states" else work / "tmp"
    asked = [argument.replace("{disk}", str(disk)) for argument in arguments]
    child = start(command(asked, work, TMPDIR=str(temporary)), work / "said")
    code = wait(child, SECONDS - 20)
    said = " ".join((work / "said.err").read_text().split())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = {key: digest for key, digest in bytes_below(disk).items() if key != "ballast"}
    shutil.rmtree(work, ignore_errors=True)
    out = {key: digest for key, digest in after.items() if key.startswith("out/")}
    old = {key: digest for key, digest in before.items() if key.startswith("out/")}
    if not on_disk:
        shutil.rmtree(disk), disk.mkdir()
    if code == 0:
        return ("done", "") if out != old or not old else ("wrong", f"said to be done, and OUT is the old one: {said}")
    if code != 1:
        return ("hang" if code is None else "crash"), f"exit code {code}: {said[-900:]}"
    if "Traceback" in said or "(run again with --debug" in said or "msp: " not in said:
        return "traceback", said[-900:]
    told = said.rpartition("msp: ")[2]
    if str(disk) not in told and "TMPDIR" not in told and "/work" not in told:
        return "wrong", f"the error names no file there: {told}"
    if out != old:
        return "lost", f"OUT is not as it was: {sorted(out)[:9]}"
    # the checkpoint stays for --resume
    left = [key for key in after if ".msp-" in key.replace(".msp-output.json", "") and "tmp/" not in key]
    if left:
        return "leftover", f"{left[:9]}"
    return "refused", ""


def _judge(report: Report, name: str, case: Any, room: int) -> None:
    part = report.parts[name]
    part.done += 1
    verdict, why = case.value or ("hang" if case.hung else "crash", case.error)
    if verdict in ("done", "refused"):
        part.what[verdict] += 1
    else:
        report.fail(name, verdict, why, room=room, seed=report.seed)


def direct(report: Report, home: Path, on_disk: bool, deadline: float, draw: random.Random) -> None:
    """The writers themselves, which take moments, at many sizes."""
    model = packed_model("llama")
    writers: dict[str, tuple[Callable[[Path], object], int]] = {
        "save_packed": (lambda disk: save_packed(model, tokenizer(), disk / "out", recipe={}, force=True), 200_000),
        "write_text": (lambda disk: write_text(disk / "out", "x" * 30_000), 60_000),
        "write_results": (lambda disk: write_results(disk / "out", dict.fromkeys("ab", "y" * 20_000)), 80_000),
        "save_tokens": (lambda disk: save_tokens(range(4000), disk / "out.safetensors"), 60_000),
    }
    part = report.part("writers", 400)
    while part.goes_on(deadline):
        name, (write, enough) = list(writers.items())[part.done % len(writers)]
        room = draw.randrange(enough)
        case = forked(lambda: _one_writer(home / "disk", name, write, room, on_disk), SECONDS)  # noqa: B023
        _judge(report, "writers", case, room)


def _one_writer(disk: Path, name: str, write: Callable[[Path], object], room: int, on_disk: bool) -> tuple[str, str]:
    if on_disk:
        mount(disk)
    write_results(disk / "out", dict.fromkeys("ab", "old")) if name != "write_text" else write_text(disk / "out", "old")
    before = bytes_below(disk)
    fill(disk, room, on_disk)
    try:
        write(disk)
        verdict = ("done", "")
    except MspError as error:
        verdict = ("refused", "")
        if "out" not in str(error):
            verdict = ("wrong", f"the error names no file: {error}")
    except BaseException as error:
        verdict = ("traceback", f"{name}: {type(error).__name__}: {error}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = {key: digest for key, digest in bytes_below(disk).items() if key != "ballast"}
    if verdict[0] == "refused" and name == "write_results":  # its mark may name what was to come
        before, after = ({k: v for k, v in each.items() if k in ("out/a", "out/b")} for each in (before, after))
        if not on_disk or after.keys() != before.keys():
            verdict = ("lost", f"{name}: {sorted(after)}") if after.keys() != before.keys() else verdict
    elif verdict[0] == "refused" and after != before:
        verdict = ("lost", f"{name}: not as it was: {sorted(after)[:9]}")
    if not on_disk:
        shutil.rmtree(disk), disk.mkdir()
    return verdict
