"""Whatever step of writing a process is killed at, there is the old or the new, and the next run clears up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from families import packed_model, save, save_text, tokenizer
from folders import contents, listing
from kill_points import killed_at_every_step
from killing import run_forked
from verbs import SMALL

from msp.base import staging
from msp.base.files import replacing, write_text
from msp.base.outputs import MARK, new_folder, write_results
from msp.cli.running import running
from msp.packed.checkpoint import save_packed
from msp.packed.info import validate_packed

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def write(out: Path, text: str, force: bool = True) -> None:
    with new_folder(out, force) as (folder, _):
        (folder / "a.txt").write_text(text)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "b.txt").write_text(text)


def read(out: Path) -> set[str]:
    return {(out / name).read_text() for name in ("a.txt", "deeper/b.txt")}


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    return str(request.param)


def test_a_folder_that_is_replaced_is_the_old_or_the_new_one(tmp_path: Path, swap: str) -> None:
    out, steps, between = tmp_path / "out", 0, 0
    write(out, "old")
    for _ in killed_at_every_step(lambda: write(out, "new"), tmp_path):
        steps += 1
        if not out.exists():
            between += 1
            assert swap == "two renames"
            write(tmp_path / "another", "x")  # any run that writes beside it finishes what was begun
            assert read(out) == {"new"}
        assert read(out) in ({"old"}, {"new"})
        write(out, "old")
        write(tmp_path / "another", "x")
        assert listing(tmp_path) == ["another", "out"] and listing(out) == [MARK, "a.txt", "deeper"]
    # between two renames there are the sync of the journal and the second rename
    assert steps > 20 and between == (2 if swap == "two renames" else 0)
    assert read(out) == {"new"} and listing(tmp_path) == ["another", "out"]


def test_a_new_folder_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for _ in killed_at_every_step(lambda: write(out, "new", force=False), tmp_path):
        assert not out.exists() or read(out) == {"new"}
        write(out, "newer")
        assert listing(tmp_path / "deep") == ["out"]
        for name in ("a.txt", "deeper/b.txt", MARK):
            (out / name).unlink()
        (out / "deeper").rmdir()
        out.rmdir()
        out.parent.rmdir()


def test_a_model_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    out, old, new = tmp_path / "out", packed_model("llama"), packed_model("qwen2")
    save_packed(old, tokenizer(), out, recipe={"of": "old"})
    before, seen = contents(out), set()
    for step in killed_at_every_step(lambda: save_packed(new, None, out, recipe={"of": "new"}, force=True), tmp_path):
        if contents(out) != before:
            seen.add(step)
            assert validate_packed(out).recipe == {"of": "new"}
            save_packed(old, tokenizer(), out, recipe={"of": "old"}, force=True)
            assert listing(tmp_path) == ["out"]
    assert seen, "killed after the exchange, too"
    assert validate_packed(out).recipe == {"of": "new"} and listing(tmp_path) == ["out"]


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    write_text(file, "old")
    for _ in killed_at_every_step(lambda: write_text(file, "new"), tmp_path):
        assert file.read_text() in ("old", "new")
        write_text(file, "old")
        assert listing(tmp_path) == ["search.json"]
    assert file.read_text() == "new"


def test_results_of_a_run_that_was_killed_are_replaced(tmp_path: Path) -> None:
    old, new = ({"a.json": text, "b.json": text} for text in ("old", "new"))
    write_results(tmp_path, old)
    for _ in killed_at_every_step(lambda: write_results(tmp_path, new), tmp_path):
        assert {(tmp_path / name).read_text() for name in old} <= {"old", "new"}
        write_results(tmp_path, old)
        assert listing(tmp_path) == [MARK, "a.json", "b.json"]


def test_all_reaches_the_disk_before_it_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, synced = tmp_path / "out", []
    fsync, exchange, replace = os.fsync, staging.exchange, os.replace

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append("/".join(path.relative_to(tmp_path).parts) or ".")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(staging, "exchange", lambda *paths: synced.append("exchange") or exchange(*paths))
    monkeypatch.setattr(os, "replace", lambda *paths: synced.append("replace") or replace(*paths))
    write(out, "old")
    new = ".out.msp-partial/new"
    for step in ("replace", "exchange"):
        swapped = len(synced) - 1 - synced[::-1].index(step)
        assert {new, f"{new}/a.txt", f"{new}/deeper", f"{new}/deeper/b.txt", f"{new}/{MARK}"} <= set(synced[:swapped])
        assert synced[swapped + 1] == "."
        synced.clear()
        write(out, "new")
    synced.clear()
    with replacing(tmp_path / "file") as file:
        file.write_text("text")
    assert synced == [".file.msp-partial/new", "replace", "."]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_like_ctrl_c(tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture) -> None:
    signal.signal(number, signal.SIG_DFL)  # Ray, started by a test before, leaves a handler of its own
    before = signal.getsignal(number)
    with (
        pytest.raises(typer.Exit) as ended,
        running(False, False, on_interrupt="interrupted, OUT is not written"),
        new_folder(tmp_path / "out") as (folder, _),
    ):
        (folder / "half").write_text("half")
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert ended.value.exit_code == 128 + number and "interrupted, OUT" in capsys.readouterr().err
    assert not listing(tmp_path) and signal.getsignal(number) == before


def test_a_command_that_is_terminated_leaves_only_its_checkpoint(tmp_path: Path) -> None:
    save("llama", tmp_path / "llama")
    save_text(tmp_path / "text.txt", seed=7)
    command = [sys.executable, "-m", "msp", "prune", str(tmp_path / "llama"), "-o", str(tmp_path / "out")]
    command += ["--calibration", str(tmp_path / "text.txt"), *SMALL, "--no-pictures", "--evaluations", "100000"]
    checkpoint = tmp_path / ".out.search" / "search.json"
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and run.poll() is None and not checkpoint.exists():
            time.sleep(0.05)
        code, _, refused = run_forked(command[command.index("prune") :], tmp_path)
        assert code == 1 and f"out is being written by process {run.pid} on " in " ".join(refused.split())
        run.terminate()
        _, told = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in told and "Traceback" not in told
    assert listing(tmp_path) == [".out.search", "llama", "text.txt"]
    assert listing(checkpoint.parent) == ["search.json"] and json.loads(checkpoint.read_text())
