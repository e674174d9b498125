"""How a verb runs: what goes to which stream, errors that nobody foresaw, interrupts and going on after them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from families import save, save_text
from killing import run_forked
from verbs import SMALL, msp_run, one_object

import msp
from msp.formats.patterns import Allocation
from msp.session.arguments import PruneArguments
from msp.session.declarations import defaults


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs `msp prune` with another msp.prune."""
    (tmp_path / "text.txt").write_text("w5 w6")
    common = ["-o", tmp_path / "out", "--calibration", tmp_path / "text.txt", "--no-pictures"]

    def run(prune, *extra: str):
        monkeypatch.setattr(msp, "prune", prune)
        return msp_run("prune", "anything", *common, *extra)

    return run


def test_an_unexpected_error_is_one_line_and_a_hint(faked):
    def prune(*_, **__):
        raise RuntimeError("boom\nwith details")

    failed = faked(prune)
    assert failed.exit_code == 1
    assert failed.stderr.strip() == "msp: RuntimeError: boom (run again with --debug for the traceback)"
    failed = faked(prune, "--debug")
    assert failed.exit_code == 1
    assert "Traceback" in failed.stderr and "with details" in failed.stderr


def test_an_interrupt_says_how_to_go_on(faked):
    def prune(*_, **__):
        raise KeyboardInterrupt

    failed = faked(prune)
    assert failed.exit_code == 1
    assert "interrupted" in failed.stderr and "--resume" in failed.stderr and not failed.stdout


def _result(**changes) -> msp.PruneResult:
    given = {
        "density": 0.25,
        "kept": 2,
        "budget": 2,
        "objective": "weights",
        "spent": 2,
        "dense_cost": 8,
        "allocation": Allocation.from_strings({"b.0.a": "2:8"}),
        "skipped": {},
        "perplexity": {"dense": 4.0, "pruned": float("inf")},
        "kl": float("nan"),
        "bytes": {"dense": 32, "packed": 9},
        "seconds": {"load": 1.0},
        "peak_memory": 5,
        "history": [],
        "sensitivities": None,
        "recipe": {},
        "model": None,
        "tokenizer": None,
    }
    return msp.PruneResult(**given | changes)


def test_standard_output_is_one_object_whatever_libraries_print(faked):
    def prune(*_, progress, **__):
        with progress.stage("Working", 2) as advance:
            print("a library prints")
            warnings.warn("a weight looks odd", UserWarning, stacklevel=1)
            warnings.warn("renamed soon", FutureWarning, stacklevel=1)
            advance(2, best=0.25)
        return _result()

    done = faked(prune, "--json")
    data = one_object(done)
    assert data["perplexity"] == {"dense": 4.0, "pruned": None} and data["kl"] is None
    assert "a library prints" in done.stderr and "warning: a weight looks odd" in done.stderr
    assert "Working" in done.stderr and "best 0.25" in done.stderr
    assert "renamed soon" not in done.stderr
    assert "∞" in faked(prune).stdout


def test_no_result_is_lost_for_a_picture(faked):
    def prune(*_, output, **__):
        output.mkdir()
        (output / "pictures").write_text("a file where a folder should be")
        return _result()

    done = faked(prune, "--pictures", "--json")
    assert one_object(done)["density"] == 0.25
    assert "warning: no pictures" in done.stderr


def test_options_left_out_have_the_declared_defaults(faked):
    seen = {}

    def prune(model, **options):
        seen.update(options)
        return _result()

    assert faked(prune).exit_code == 0
    declared, given = {**defaults(PruneArguments), "sparsity": 0.75}, ("calibration", "work_dir")
    told = {name: value for name, value in seen.items() if name in declared and name not in given}
    assert told == {name: value for name, value in declared.items() if value is not None}
    assert faked(prune, "--test-tokens", "12").exit_code == 0
    assert seen["test_tokens"] == 12


def test_ctrl_c_leaves_nothing_and_resumes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """A real interrupt in the middle of a real search, and the same command again with --resume."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path / "out"
    save("llama", home / "llama")
    save_text(home / "text.txt", seed=7)
    command = [sys.executable, "-m", "msp", "prune", str(home / "llama"), "-o", str(out)]
    command += ["--calibration", str(home / "text.txt"), *SMALL, "--no-pictures", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoint = tmp_path / ".out.search" / "search.json"
    long = subprocess.Popen(
        [*command, "--evaluations", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell's background jobs, and what they start, ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and long.poll() is None and not _generations(checkpoint) > 2:
        time.sleep(0.05)
    long.send_signal(signal.SIGINT)
    stdout, stderr = long.communicate(timeout=120)
    assert long.returncode == 1, stderr
    assert "interrupted" in stderr and "--resume" in stderr and "Traceback" not in stderr and not stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.search"]
    kept = json.loads(checkpoint.read_text())["generation"]
    assert kept > 2

    asked = command[command.index("prune") :]
    code, _, told = run_forked([*asked, "--evaluations", "16", "--resume", "--seed", "1"], home)
    assert code == 1 and "another search" in told
    code, answer, told = run_forked([*asked, "--evaluations", str(16 * (kept + 2)), "--resume"], home)
    assert code == 0, told
    history = json.loads(answer)["history"]
    assert [step["generation"] for step in history] == list(range(kept + 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def _generations(checkpoint: Path) -> int:
    try:
        return int(json.loads(checkpoint.read_text())["generation"])
    except (OSError, ValueError):
        return 0
