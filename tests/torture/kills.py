"""Kills runs at random moments, resumes them, and compares what they leave with what an undisturbed run leaves.

Most runs are forked from a process that has imported everything, so that kills land in the work and not in imports; a
few are whole ``msp`` processes. ``save`` is ``save_packed`` alone. ``workers`` are searches on a Ray cluster, of which
either the search or a worker is killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from families import packed_model, save, save_text, tokenizer
from killing import bytes_below

from msp.errors import MspError
from msp.packed.checkpoint import save_packed
from torture.harness import Report, Shares, command, kill, start, wait, workplace

KILLS = 50
# A run that takes so much longer than an undisturbed one hangs.
SECONDS = 180
SMALL = [
    "--calibration", "text.txt", "--device", "cpu", "--json", "--window", "16", "--calibration-tokens", "128",
    "--fitness-tokens", "512", "--test-tokens", "64",
]  # fmt: skip
SEARCH = [*SMALL, "--evaluations", "32"]
TRAINING = [
    "--calibration", "text.txt", "--device", "cpu", "--json", "--window", "16", "--tokens", "2048", "--batch-tokens",
    "64", "--held-out-tokens", "256", "--test-tokens", "64", "--learning-rate", "0.003",
]  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """A command that is killed: arguments, what is added when it runs again, and its results below the folder."""

    arguments: list[str]
    resume: list[str] = field(default_factory=lambda: ["--resume"])
    # as a whole there or not: what is there after a kill is the old or the new
    one: bool = False


VERBS = {
    "prune": Verb(["prune", "model", "-o", "out", "--force", *SEARCH], one=True),
    "search": Verb(["search", "model", "-o", "out", *SEARCH]),
    "compare": Verb(
        ["compare", "model", "-o", "out.png", "--allocators", "uniform,msp", "--seeds", "1", *SEARCH], resume=[]
    ),
    "pareto": Verb(["search", "model", "-o", "out", "--sparsity", "0.5,0.75", *SEARCH]),
    "recover": Verb(["recover", "packed", "--teacher", "model", "-o", "out", "--force", *TRAINING], one=True),
    "stream": Verb(["prune", "model", "-o", "out", "--force", "--stream", "--hidden-bytes", "20kB", *SEARCH], one=True),
}
UNEQUAL = ("seconds", "peak_memory")


def run(report: Report, seconds: float) -> None:
    """All verbs get a share of the time, and Ray, whose workers take seconds to start, what is left."""
    draw = random.Random(f"{report.seed}/kills")
    shares = Shares(seconds, len(VERBS) + 4)
    with workplace() as home:
        save("llama", home / "model")
        save_packed(packed_model("llama"), tokenizer(), home / "packed", recipe={})
        save_text(home / "text.txt", 7)
        kill_saves(report, shares.next(), draw, home)
        for name, verb in VERBS.items():
            kill_verb(report, name, verb, shares.next(), draw, home)
        kill_workers(report, shares.rest(), draw, home)


def contents(folder: Path) -> dict[str, str]:
    """All files that a run may leave: no inputs."""
    return {
        name: digest
        for name, digest in bytes_below(folder).items()
        if name.split("/")[0] not in ("model", "packed", "text.txt", "said.out", "said.err")
    }


def said(folder: Path) -> Any:
    """What a run printed, without what differs from run to run."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in UNEQUAL}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(json.loads((folder / "said.out").read_text()))


class Scene:
    """A folder with links to a model and a text, in which a verb runs, and what an undisturbed run of it left."""

    def __init__(self, home: Path, name: str, verb: Verb) -> None:
        self.home, self.name, self.verb = home, name, verb
        self.inputs = bytes_below(home / "model") | bytes_below(home)
        began = time.monotonic()
        folder = self.new("whole")
        code = wait(self.start(folder, verb.arguments), SECONDS)
        self.seconds = time.monotonic() - began
        assert code == 0, (folder / "said.err").read_text()
        self.files, self.answer = contents(folder), said(folder)
        shutil.rmtree(folder)

    def new(self, name: str) -> Path:
        folder = self.home / f"{self.name}-{name}"
        folder.mkdir()
        (folder / "tmp").mkdir()
        (folder / "model").symlink_to(self.home / "model")
        (folder / "packed").symlink_to(self.home / "packed")
        (folder / "text.txt").symlink_to(self.home / "text.txt")
        return folder

    def start(self, folder: Path, arguments: Sequence[str], whole: bool = False) -> int:
        environment = {"TMPDIR": str(folder / "tmp")}
        if not whole:
            return start(command(list(arguments), folder, **environment), folder / "said")

        def run() -> None:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, "-m", "msp", *arguments], {**os.environ, **environment})

        return start(run, folder / "said")

    def wrong_after_a_kill(self, folder: Path, old: dict[str, str]) -> str:
        """What a kill must not have done."""
        if not self.verb.one:
            return ""
        there = {name: digest for name, digest in contents(folder).items() if name.startswith("out/")}
        drawn = {name: digest for name, digest in there.items() if name.startswith("out/pictures/")}
        model = {name: digest for name, digest in there.items() if name not in drawn}
        new = {name: digest for name, digest in self.files.items() if not name.startswith("out/pictures/")}
        return "" if model in (old, new) else f"OUT is neither old nor new: {sorted(model)}"

    def wrong_at_the_end(self, folder: Path) -> Iterator[tuple[str, str]]:
        files = contents(folder)
        if files != self.files:
            differ = sorted(
                name for name in files.keys() | self.files.keys() if files.get(name) != self.files.get(name)
            )
            hidden = [name for name in differ if name not in self.files]
            yield ("leftover" if hidden == differ else "wrong"), f"other files than undisturbed: {differ[:9]}"
        if said(folder) != self.answer:
            yield "wrong", "other figures than undisturbed"
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(".msp-lock")]
        left += [str(path.relative_to(folder)) for path in folder.rglob(".*.msp-*")]
        left += [str(path.relative_to(folder)) for path in (folder / "tmp").iterdir()]
        if left:
            yield "leftover", f"left: {left[:9]}"
        if (bytes_below(self.home / "model") | self.unchanged()) != self.inputs:
            yield "lost", "the input was changed"

    def unchanged(self) -> dict[str, str]:
        return {name: digest for name, digest in bytes_below(self.home).items() if name in self.inputs}


def kill_verb(report: Report, name: str, verb: Verb, deadline: float, draw: random.Random, home: Path) -> None:
    part = report.part(name, KILLS)
    scene = Scene(home, name, verb)
    part.notes["undisturbed_seconds"] = round(scene.seconds, 2)
    number = 0
    while part.goes_on(deadline):
        # one sequence in twelve is of whole processes, whose first seconds are imports
        sequence(report, name, scene, draw, number, whole=number % 12 == 11)
        number += 1
    part.notes["sequences"] = number


def sequence(report: Report, name: str, scene: Scene, draw: random.Random, number: int, *, whole: bool) -> None:
    """Kill a command one to five times, resume it each time, let the last run end, and judge."""
    part, verb = report.parts[name], scene.verb
    folder, wished, moments = scene.new(str(number)), draw.randint(1, 5), list[float]()
    old: dict[str, str] = {}
    if verb.one and number % 2:
        save_packed(packed_model("qwen2"), tokenizer(), folder / "out", recipe={"of": "old"})
        old = {key: digest for key, digest in contents(folder).items() if key.startswith("out/")}
    seconds = scene.seconds + (4.0 if whole else 0.0)
    again = {"sequence": number, "whole_process": whole, "moments": moments}
    while True:
        child = scene.start(folder, [*verb.arguments, *(verb.resume if moments else [])], whole)
        if len(moments) == wished:
            code = wait(child, SECONDS)
            break
        moment = draw.uniform(0, seconds)
        code = wait(child, moment)
        if code is not None:
            break
        kill(child)
        moments.append(round(moment, 3))
        part.done += 1
        part.what["killed whole process" if whole else "killed"] += 1
        part.what["with a checkpoint"] += any(folder.glob(".out.*/*"))
        part.what["with a partial file"] += any(folder.rglob("*.msp-partial"))
        if wrong := scene.wrong_after_a_kill(folder, old):
            report.fail(name, "lost", wrong, **again)
    if code is None:
        kill(child)
        report.fail(name, "hang", f"no end after {SECONDS} s", **again)
    elif code != 0:
        report.fail(name, "crash" if code < 0 else "refused", f"{code}: {(folder / 'said.err').read_text()}", **again)
    else:
        part.what["resumed to the end" if moments else "ended before the kill"] += 1
        for kind, why in scene.wrong_at_the_end(folder):
            report.fail(name, kind, why, **again)
    shutil.rmtree(folder)


def kill_saves(report: Report, deadline: float, draw: random.Random, home: Path) -> None:
    """A model that stands at OUT is replaced by another; after a kill it is the one or the other."""
    part = report.part("save", KILLS)
    models = [packed_model("llama"), packed_model("qwen2")]
    beside = home / "saves"
    beside.mkdir()

    def write(which: int, out: Path = beside / "out") -> Path:
        return save_packed(models[which], tokenizer(), out, recipe={"of": which}, force=True)

    wholes = [bytes_below(write(which)) for which in (0, 1)]
    began = time.monotonic()
    write(0)
    seconds = time.monotonic() - began
    now = 0
    while part.goes_on(deadline):
        child = start(lambda which=1 - now: write(which), home / "said")
        moment = draw.uniform(0, 1.2 * seconds)
        code = wait(child, moment)
        kill(child) if code is None else None
        again = {"moment": round(moment, 4), "number": part.done}
        found = bytes_below(beside / "out") if (beside / "out").exists() else {}
        if code is not None:
            part.what["ended before the kill"] += 1
        else:
            part.done += 1
            part.what["killed"] += 1
            part.what["with leftovers"] += len(list(beside.iterdir())) > 1
        if found not in wholes:
            report.fail("save", "lost", f"OUT is neither old nor new: {sorted(found)}", **again)
            shutil.rmtree(beside / "out", ignore_errors=True)
        now = draw.randrange(2)
        try:
            if bytes_below(write(now)) != wholes[now]:
                report.fail("save", "wrong", "the next save gives other bytes", **again)
        except MspError as error:
            report.fail("save", "refused", f"the next save: {error}", **again)
            shutil.rmtree(beside), beside.mkdir()
            write(now)
        if left := [path.name for path in beside.iterdir() if path.name != "out"]:
            report.fail("save", "leftover", f"left after the next save: {left}", **again)
    shutil.rmtree(beside)


@contextmanager
def ray_cluster(folder: Path) -> Iterator[tuple[str, Callable[[], list[int]]]]:
    """A cluster of one node with two processors: its address, and the workers that hold a model."""
    from msp.engine.distributed import prepare_environment

    prepare_environment()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # reached from this machine alone
    port = random.randrange(20000, 30000)
    head = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
    ]
    head += ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=100000000"]
    log = (folder / "head.log").open("wb")
    process = subprocess.Popen(head, stdout=log, stderr=log, start_new_session=True)

    def below(root: int) -> Iterator[int]:
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    status = (entry / "stat").read_text()
                except OSError:
                    continue
                parents.setdefault(int(status.rpartition(")")[2].split()[1]), []).append(int(entry.name))
        found = [root]
        for each in found:
            found += parents.get(each, [])
        return iter(found)

    def workers() -> list[int]:
        found = []
        for each in below(process.pid):
            try:
                if b"ray::CandidateWorker" in Path(f"/proc/{each}/cmdline").read_bytes():
                    found.append(each)
            except OSError:
                continue
        return found

    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", workers
    finally:
        mine = list(below(process.pid))
        for each in mine:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        log.close()


def kill_workers(report: Report, deadline: float, draw: random.Random, home: Path) -> None:
    """Searches on a cluster: either a worker is killed, which is replaced, or the search, which is resumed."""
    part = report.part("workers", KILLS)
    alone = Scene(home, "workers", Verb(["search", "model", "-o", "out", *SEARCH, "--evaluations", "192"]))
    short = Path("/tmp") / f"msp-ray-{os.getpid()}"  # sockets have short paths
    short.mkdir()
    try:
        with ray_cluster(short) as (address, workers):
            arguments = [*alone.verb.arguments, "--workers", "1", "--ray-address", address]
            number = 0
            while part.goes_on(deadline):
                _worker_sequence(report, alone, arguments, workers, draw, number)
                number += 1
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _worker_sequence(
    report: Report,
    scene: Scene,
    arguments: list[str],
    workers: Callable[[], list[int]],
    draw: random.Random,
    number: int,
) -> None:
    part, folder, moments = report.parts["workers"], scene.new(str(number)), list[str]()
    again = {"sequence": number, "moments": moments}
    deaths = kills = 0
    wished = draw.randint(1, 4)
    child = scene.start(folder, arguments)
    began, code = time.monotonic(), None
    while code is None and time.monotonic() - began < SECONDS:
        if kills == wished:
            code = wait(child, SECONDS)
            break
        code = wait(child, draw.uniform(0.05, 3.0))
        if code is not None:
            break
        mine = workers()
        if mine and deaths < 2 and draw.random() < 0.7:  # a third death on one part is an error, as documented
            os.kill(draw.choice(mine), signal.SIGKILL)
            deaths += 1
            part.what["worker killed"] += 1
        elif mine:
            kill(child)
            part.what["search killed"] += 1
            deaths = 0
            child = scene.start(folder, [*arguments, "--resume"])
        else:
            continue
        kills += 1
        part.done += 1
        moments.append(f"{time.monotonic() - began:.2f}")
    if code is None:
        kill(child)
        report.fail("workers", "hang", f"no end after {SECONDS} s", **again)
    elif code != 0:
        report.fail("workers", "refused", f"{code}: {(folder / 'said.err').read_text()}", **again)
    else:
        part.what["ended right"] += 1
        for kind, why in scene.wrong_at_the_end(folder):
            report.fail("workers", kind, why, **again)
    shutil.rmtree(folder)
