"""Many at once: threads on one model, two processes at one place, a reader beside a writer, fork and spawn."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from families import packed_model, save, save_text, tokenizer, tokens
from killing import bytes_below

from msp.base.hashes import hash_tensor
from msp.base.outputs import working_folder, write_results
from msp.errors import MspError
from msp.models.loading import load_model
from msp.packed.checkpoint import save_packed
from torture.harness import Report, Shares, command, forked, kill, start, wait, workplace
from torture.kills import SEARCH

SECONDS = 120


def run(report: Report, seconds: float) -> None:
    draw = random.Random(f"{report.seed}/concurrency")
    shares = Shares(seconds, 7)
    for part in (threads, writers, folders, searches, readers, forks, spawns):
        with workplace() as home:
            part(report, home, shares.next(), draw)


def fail(report: Report, name: str, kind: str, why: str) -> None:
    report.fail(name, kind, why, seed=report.seed, number=report.parts[name].done)


@torch.no_grad()
def logits(model: Any, length: int = 12, seed: int = 1) -> str:
    return str(hash_tensor(model(input_ids=tokens(2, length, seed)).logits))


def threads(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    """Forwards of one packed model from many threads, while its bitmasks are new and when they are known."""
    part = report.part("threads on one model", 200)
    while part.goes_on(deadline):
        model = packed_model(draw.choice(["llama", "qwen2", "gpt2"]), draw.randrange(99))
        lengths = [draw.choice([1, 3, 12, 40]) for _ in range(8)]
        wanted = [logits(pickle.loads(pickle.dumps(model)), length) for length in lengths]
        found: list[str] = [""] * len(lengths)

        def work(which: int, model: Any = model, lengths: Any = lengths, found: Any = found) -> None:
            try:
                found[which] = logits(model, lengths[which])
            except Exception as error:
                found[which] = f"{type(error).__name__}: {error}"

        crew = [threading.Thread(target=work, args=(which,)) for which in range(len(lengths))]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join(SECONDS)
        part.done += 1
        if any(thread.is_alive() for thread in crew):
            fail(report, "threads on one model", "hang", f"no end after {SECONDS} s")
            return
        if found != wanted:
            fail(report, "threads on one model", "wrong", f"{found} instead of {wanted}")


def writers(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    """Two processes save to one OUT: one after the other, or one is told who is there."""
    part = report.part("two writers of one OUT", 150)
    models = [packed_model("llama"), packed_model("qwen2")]
    place = home / "place"
    place.mkdir()

    def write(which: int, delay: float) -> str:
        time.sleep(delay)
        try:
            save_packed(models[which], tokenizer(), place / "out", recipe={"of": which}, force=True)
            return "written"
        except MspError as error:
            return "refused" if "is being written by" in str(error) else f"{error}"

    wholes = []
    for which in (0, 1):
        write(which, 0)
        wholes.append(bytes_below(place / "out"))
    while part.goes_on(deadline):
        said = home / "said"
        ended = [home / f"ended-{which}" for which in (0, 1)]
        children = [
            start(lambda which=which: ended[which].write_text(write(which, draw.random() * 0.03)), said)  # noqa: B023
            for which in (0, 1)
        ]
        codes = [wait(child, SECONDS) for child in children]
        part.done += 1
        told = [file.read_text() if file.exists() else "nothing" for file in ended]
        for each in told:
            part.what[each if each in ("written", "refused") else "other"] += 1
        if codes != [0, 0] or "written" not in told or not set(told) <= {"written", "refused"}:
            fail(report, "two writers of one OUT", "crash", f"{codes} {told}")
        if bytes_below(place / "out") not in wholes:
            fail(report, "two writers of one OUT", "lost", "OUT is neither the one nor the other")
        if left := [path.name for path in place.iterdir() if path.name != "out"]:
            fail(report, "two writers of one OUT", "leftover", f"{left}")
        for file in ended:
            file.unlink(missing_ok=True)


def folders(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    """Two processes lock one working folder and write results to it; there is never more than one in it."""
    part = report.part("two users of one work folder", 300)
    inside = home / "inside"

    def use(which: int) -> None:
        try:
            with working_folder(home / "work"):
                descriptor = os.open(inside, os.O_CREAT | os.O_EXCL)
                os.close(descriptor)
                write_results(home / "work", {"a": str(which)})
                time.sleep(0.002)
                inside.unlink()
        except MspError as error:
            if "is being written by" not in str(error):
                raise

    while part.goes_on(deadline):
        children = [start(lambda which=which: use(which), home / f"said-{which}") for which in (0, 1)]
        codes = [wait(child, SECONDS) for child in children]
        part.done += 1
        if codes != [0, 0]:
            errors = "".join((home / f"said-{which}.err").read_text() for which in (0, 1))
            fail(report, "two users of one work folder", "crash", f"{codes}: {errors}")
            inside.unlink(missing_ok=True)
        if left := [path.name for path in (home / "work").iterdir() if path.name not in ("a", ".msp-output.json")]:
            fail(report, "two users of one work folder", "leftover", f"{left}")


def searches(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    """The same command twice at once: one gives what it gives alone, the other says who is there."""
    part = report.part("two searches of one OUT", 20)
    save("llama", home / "model")
    save_text(home / "text.txt", 7)
    asked = ["search", "model", "-o", "out", *SEARCH]
    assert wait(start(command([*asked[:3], "alone", *asked[4:]], home), home / "alone-said"), SECONDS) == 0
    alone = bytes_below(home / "alone")
    while part.goes_on(deadline):
        children = []
        for which in (0, 1):
            children.append(start(command(asked, home), home / f"said-{which}"))
            time.sleep(draw.random() * 0.2)
        codes = [wait(child, SECONDS) for child in children]
        for child, code in zip(children, codes, strict=True):
            if code is None:
                kill(child)
        part.done += 1
        said = [(home / f"said-{which}.err").read_text() for which in (0, 1)]
        part.what["one refused"] += sorted(map(str, codes)) == ["0", "1"]
        part.what["one after the other"] += codes == [0, 0]
        refused = all(
            code == 0 or "is being written by" in " ".join(text.split()) for code, text in zip(codes, said, strict=True)
        )
        if 0 not in codes or not refused:
            fail(report, "two searches of one OUT", "crash", f"{codes} {said}")
        elif bytes_below(home / "out") != alone:
            fail(report, "two searches of one OUT", "wrong", "other files than alone")
        if left := [path.name for path in home.iterdir() if path.name.startswith(".")]:
            fail(report, "two searches of one OUT", "leftover", f"{left}")
        shutil.rmtree(home / "out", ignore_errors=True)


def readers(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    """A model is loaded while another process replaces it again and again: old, new, or an error; no mixture."""
    name = "a reader beside a writer"
    part = report.part(name, 300)
    models = [packed_model("llama", seed) for seed in (0, 1)]
    for model in models:
        save_packed(model, tokenizer(), home / "out", recipe={}, force=True)
    wanted = {logits(model) for model in models}

    def write() -> None:
        while True:
            for model in models:
                save_packed(model, tokenizer(), home / "out", recipe={}, force=True)

    writer = start(write, home / "said")
    try:
        while part.goes_on(deadline):
            ended = forked(lambda: _load(home / "out"), SECONDS)
            part.done += 1
            found = ended.value
            if ended.hung or ended.code:
                fail(report, name, "hang" if ended.hung else "crash", ended.error)
            elif found == "refused" or found in wanted:
                part.what["refused" if found == "refused" else "loaded"] += 1
            else:
                fail(report, name, "wrong", f"logits of neither: {found}")
        if wait(writer, 0) is not None:
            fail(report, name, "crash", (home / "said.err").read_text())
    finally:
        kill(writer)


def _load(out: Path) -> str:
    try:
        return logits(load_model(out).model)
    except MspError:
        return "refused"


def forks(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    """A process that has used a model, on one thread or on several, forks: its children compute the same bits."""
    part = report.part("fork after use", 100)
    torch.set_num_threads(1)
    while part.goes_on(deadline):
        model = packed_model(draw.choice(["llama", "qwen2"]), draw.randrange(99))
        wanted = logits(model) if part.done % 2 else ""  # before the fork, or only in the children
        found = [forked(lambda: logits(model), 30) for _ in range(2)]  # noqa: B023
        part.done += 1
        if any(each.hung for each in found):
            fail(report, "fork after use", "hang", "a child does not end")
        elif any(each.code for each in found):
            fail(report, "fork after use", "crash", found[0].error + found[1].error)
        elif {each.value for each in found} != {wanted or logits(model)}:
            fail(report, "fork after use", "wrong", f"{[each.value for each in found]}")


def spawns(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    """A packed model goes to a process that is spawned, by pickle, and comes back."""
    part = report.part("spawn", 12)
    context = multiprocessing.get_context("spawn")
    model = packed_model("llama")
    wanted = logits(model)
    with context.Pool(1) as pool:
        while part.goes_on(deadline):
            # torch hands tensors over as shared memory, and bytes as they are
            sent = pickle.dumps(model) if part.done % 2 else model
            try:
                found, back = pool.apply_async(_spawned, (sent,)).get(SECONDS)
            except multiprocessing.TimeoutError:
                fail(report, "spawn", "hang", f"no answer in {SECONDS} s")
                part.done += 1
                break
            part.done += 1
            back = pickle.loads(back) if isinstance(back, bytes) else back
            if found != wanted or logits(back) != wanted:
                fail(report, "spawn", "wrong", f"{found} instead of {wanted}")


def _spawned(model: Any) -> tuple[str, Any]:
    as_bytes = isinstance(model, bytes)
    model = pickle.loads(model) if as_bytes else model
    return logits(model), pickle.dumps(model) if as_bytes else model
