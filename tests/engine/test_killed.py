"""``msp search`` killed without a chance to say goodbye, as a user's would be by the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from families import SMALL, VOCABULARY, save
from typer.testing import CliRunner

import msp
from msp.base.progress import Advance, NoProgress
from msp.cli import app
from msp.text.token_sets import save_tokens


def generations(checkpoint: Path) -> int:
    try:
        return int(json.loads(checkpoint.read_text())["generation"])
    except OSError:
        return 0


def test_a_killed_command_loses_at_most_a_generation(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    words = torch.randint(3, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(7)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    options = ["search", str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt"), "--window", "16"]
    options += ["--calibration-tokens", "64", "--fitness-tokens", "64", "--test-tokens", "64", "--json"]
    options += ["--device", "cpu", "--work-dir", str(tmp_path / "work"), "-o", str(tmp_path / "found")]

    checkpoint = tmp_path / "work" / "search.json"
    command = [sys.executable, "-m", "msp", *options, "--evaluations", "1000000"]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and killed.poll() is None and generations(checkpoint) < 3:
        time.sleep(0.02)
    seen = generations(checkpoint)
    killed.kill()
    assert killed.communicate() == (b"", None) and killed.returncode == -9
    # the file is whole, and holds at least what was seen of it
    assert generations(checkpoint) >= seen >= 3 and not (tmp_path / "found" / "allocation.json").exists()
    before = json.loads(checkpoint.read_text())

    limit = ["--evaluations", str(16 * (before["generation"] + 2))]
    # the checkpoint is where --work-dir says, whatever the output is called
    resumed = CliRunner().invoke(app, [*options, *limit, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    whole = CliRunner().invoke(app, [*options[:-3], str(tmp_path / "other"), "-o", str(tmp_path / "whole"), *limit])
    assert whole.exit_code == 0, whole.stderr
    first, second = json.loads(resumed.stdout), json.loads(whole.stdout)
    assert first["history"][: len(before["history"])] == before["history"]
    assert len(first["history"]) == before["generation"] + 3
    assert first["history"] == second["history"] and first["allocation"] == second["allocation"]
    assert (tmp_path / "found" / "allocation.json").read_text() == (tmp_path / "whole" / "allocation.json").read_text()


def test_a_generation_is_on_disk_before_the_next_one_begins(tmp_path: Path) -> None:
    model, checkpoint = save("llama", tmp_path / "model"), tmp_path / "work" / "search.json"
    save_tokens(torch.randint(0, model.config.vocab_size, (4096,)), tmp_path / "tokens.safetensors")
    seen: list[int] = []

    class Watching(NoProgress):
        @contextmanager
        def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
            def advance(done: int, total: int | None = None, /, **info: object) -> None:
                if name == "Search":
                    assert generations(checkpoint) == done
                    seen.append(done)

            yield advance

    options = {**SMALL, "sparsity": 0.7, "calibration": str(tmp_path / "tokens.safetensors"), "evaluations": 64}
    msp.search(tmp_path / "model", work_dir=checkpoint.parent, progress=Watching(), **options)
    assert seen == [0, 1, 2, 3, 4]
