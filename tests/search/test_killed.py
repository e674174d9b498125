"""``msp search`` killed without a chance to say goodbye, as a user's would be by the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from families import VOCABULARY, save
from typer.testing import CliRunner

from msp.cli import app


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
    assert generations(checkpoint) >= seen >= 3 and not (tmp_path / "found").exists()
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
