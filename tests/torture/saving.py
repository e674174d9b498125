"""Kills what msp writes at every step that it takes on the file system: the old or the new is there, and no more."""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import packed_model, tokenizer
from kill_points import killed_at_every_step

import msp
from msp.base import staging
from msp.base.files import write_text
from msp.base.outputs import new_folder, write_results
from msp.formats.patterns import Allocation
from msp.ops import nm_select
from msp.packed.checkpoint import save_packed
from msp.plan.decode_table import DecodeTable
from msp.show.pictures import sensitivity_picture
from msp.text.token_sets import save_tokens
from torture.formats import database, stored
from torture.harness import FULL_MINUTES, Report, Shares, workplace

# Of a shorter run: every so many steps, from a random one on.
STRIDE = 7


@dataclass(frozen=True)
class Saving:
    """Something that msp writes to ``out``, in an old and a new version.

    Attributes:
        apart: several files, of which each is old or new.
        fresh: nothing stands there before.
    """

    write: Callable[[Path, bool], object]
    apart: bool = False
    fresh: bool = False


def a_folder(out: Path, new: bool) -> None:
    with new_folder(out, True) as (folder, _):
        (folder / "deeper").mkdir()
        for name in ("a.txt", "deeper/b.txt"):
            (folder / name).write_text(f"{'new' if new else 'old'} {name}")


@functools.cache
def packed(family: str) -> Any:
    return packed_model(family)


def a_model(out: Path, new: bool, **options: str) -> None:
    model = packed("qwen2" if new else "llama")
    save_packed(model, None if new else tokenizer(), out, recipe={"new": new}, force=True, **options)


def a_dense_model(out: Path, new: bool) -> None:
    source = out.parent.parent / f"packed-{new}"
    if not source.exists():
        a_model(source, new)
    msp.export_dense(source, out, force=True)


def levels(out: Path, new: bool) -> None:
    found, weights = database(out)
    found.open()
    for name, weight in weights.items():
        found.write(name, [nm_select(weight + new, pattern) for pattern in found.patterns[name]])


def results(out: Path, new: bool) -> None:
    write_results(out, dict.fromkeys(("a.json", "b.json"), "new" if new else "old"))


SAVINGS = {
    "file": Saving(lambda out, new: write_text(out, "new" if new else "old")),
    "folder": Saving(a_folder),
    "folder, two renames": Saving(a_folder),
    "folder that was not there": Saving(a_folder, fresh=True),
    "model": Saving(a_model),
    "model, two renames": Saving(a_model),
    "model in shards": Saving(lambda out, new: a_model(out, new, max_shard_size="20KB")),
    "model that was not there": Saving(a_model, fresh=True),
    "dense model": Saving(a_dense_model),
    "results of a search": Saving(results, apart=True),
    "level database": Saving(levels, apart=True),
    "tokens": Saving(lambda out, new: save_tokens([5, 6, 7 + new], out.with_suffix(".safetensors"))),
    "allocation": Saving(lambda out, new: Allocation.from_strings({"a": "2:8" if new else "4:8"}).save(out)),
    "decode table": Saving(lambda out, new: DecodeTable("float32", {"new": new}, {}).save(out)),
    "picture": Saving(lambda out, new: sensitivity_picture({"b.0.q": 1.0 + new}, out.with_suffix(".png"))),
}


def run(report: Report, seconds: float) -> None:
    draw = random.Random(f"{report.seed}/saving")
    shares = Shares(seconds, len(SAVINGS))
    every = 1 if report.minutes >= FULL_MINUTES else STRIDE
    report.notes["every_step"] = every == 1
    for name, saving in SAVINGS.items():
        try_saving(report, name, saving, shares.next(), every, draw.randrange(every))


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file; of safetensors without their metadata, whose order is drawn anew by every process."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            if file.suffix == ".safetensors":
                data = repr(sorted(stored(data).items())).encode()
            found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def try_saving(report: Report, name: str, saving: Saving, deadline: float, every: int, first: int) -> None:
    part = report.part(name, 1)
    with workplace() as work:
        place = work / "place"
        place.mkdir()
        out, exchange = place / "out", staging.exchange
        if "two renames" in name:
            staging.exchange = lambda *_: False
        try:
            saving.write(out, True)
            names, after = {path.name for path in place.iterdir()}, contents(place)
            saving.write(out, False)
            before = contents(place)
            assert before != after
            if saving.fresh:
                _remove(out)
            for step in killed_at_every_step(lambda: saving.write(out, True), work, every=every, first=first):
                part.done += 1
                found = {key: each for key, each in contents(place).items() if ".msp-" not in key.split("/")[0]}
                if why := _wrong(found, before, after, saving, "two renames" in name, place):
                    report.fail(name, "lost", why, step=step)
                saving.write(out, False)
                if contents(place) != before or {path.name for path in place.iterdir()} != names:
                    left = sorted(path.name for path in place.iterdir())
                    report.fail(name, "leftover", f"after the next run: {left}", step=step)
                    shutil.rmtree(place), place.mkdir()
                    saving.write(out, False)
                if saving.fresh:
                    _remove(out)
                if time.monotonic() > deadline:
                    part.what["cut short"] += 1
                    break
            else:
                if contents(place) != after:
                    report.fail(name, "wrong", "not killed, and not as it is to be")
        except AssertionError as error:
            report.fail(name, "refused", str(error))
        finally:
            staging.exchange = exchange
    part.asked = max(part.done, 1)


def _remove(out: Path) -> None:
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def _wrong(
    found: dict[str, str], before: dict[str, str], after: dict[str, str], saving: Saving, renames: bool, place: Path
) -> str:
    """What a kill must not have done; where two renames stand for an exchange, any run beside OUT ends the second."""
    if saving.apart:
        # a mark may name both versions of a file, and hidden files are the next run's
        for name, digest in found.items():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not hidden and digest not in (before.get(name), after.get(name)):
                return f"{name} is neither old nor new"
        return ""
    if found in (before, after) or (saving.fresh and not found):
        return ""
    if renames and not found:
        with new_folder(place / "another") as (folder, _):
            (folder / "x").write_text("x")
        shutil.rmtree(place / "another")
        found = contents(place)
        return "" if found == after else "the second rename was not finished"
    return f"neither old nor new: {sorted(found)[:9]}"
