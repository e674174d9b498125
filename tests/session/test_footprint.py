"""How much memory a run takes is estimated before, and what does not fit is streamed or refused."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SMALL, save, tokens
from torch import Tensor
from typer.testing import CliRunner

import msp
from msp.base import host_memory
from msp.base.host_memory import available
from msp.base.progress import NoProgress
from msp.cli import app
from msp.errors import MspError, UsageError
from msp.formats.patterns import Allocation, NMPattern
from msp.models.loading import load_model
from msp.ops import PackedWeight
from msp.pruners.base import LinearStatistics
from msp.pruners.sparsegpt import SparseGPTPruner
from msp.session import footprint, preview
from msp.session.footprint import hidden_bytes
from msp.session.opened import open_model
from msp.session.options import Options
from msp.text.token_sets import save_tokens

ENOUGH = 1 << 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_tokens(tokens(1, 4000, seed=1)[0], path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_weights_are_those_that_loading_holds(family: str, dtype: torch.dtype, text: str, tmp_path: Path) -> None:
    save(family, tmp_path, dtype=dtype)
    planned = msp.dry_run(tmp_path, sparsity=0.5, calibration=text, **SMALL)
    held = load_model(tmp_path, narrow=True).model
    assert planned.memory is not None
    if family == "mixtral":  # where its tokens go, no forward without weights can say: all is counted as fp32
        assert planned.memory.weights >= footprint.held_bytes(held)
    else:
        assert planned.memory.weights == footprint.held_bytes(held)
    assert planned.memory.peak == planned.memory.base + planned.memory.weights + max(planned.memory.stages.values())


def test_a_dry_run_plans_what_the_run_does(text: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    options: dict[str, Any] = {"sparsity": 0.5, "calibration": text, "keep": ".*down_proj=dense", **SMALL}
    planned = msp.dry_run(tmp_path / "dense", **options)
    done = msp.prune(tmp_path / "dense", allocator="uniform", **options)
    assert (planned.budget, planned.skipped) == (done.budget, done.skipped)
    assert planned.bytes["dense"] == done.bytes["dense"]
    assert planned.bytes["packed"] == pytest.approx(done.bytes["packed"], rel=0.1)
    json.dumps(planned.to_json())


def test_the_command_writes_and_loads_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "dense")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("msp.session.opened.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    command = ["prune", str(tmp_path / "dense"), "-o", str(tmp_path / "out"), "--calibration", text, "--dry-run"]
    found = CliRunner().invoke(app, [*command, "--window", "16"])
    assert found.exit_code == 0, found.output
    assert "searching" in found.output and "peak" in found.output
    as_json = CliRunner().invoke(app, [*command, "--window", "16", "--json"])
    assert json.loads(as_json.stdout)["memory"]["peak"] > 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "out").mkdir()
    assert "exists already" in CliRunner().invoke(app, command).output


@pytest.mark.parametrize(("output", "streams"), [(True, True), (False, False)])
def test_what_does_not_fit_is_streamed_or_refused(
    output: bool, streams: bool, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path / "dense")
    options: dict[str, Any] = {"sparsity": 0.5, "allocator": "uniform", "calibration": text, **SMALL}
    expected = msp.prune(tmp_path / "dense", output=tmp_path / "whole", **options)
    needs = {
        stream: preview._needed(tmp_path / "dense", Options.parse(stream=stream, **options)) for stream in (False, True)
    }
    assert needs[True] < needs[False]
    monkeypatch.setattr(preview, "AMPLE", ENOUGH)
    between = (needs[True] + needs[False]) // 2
    monkeypatch.setattr(preview, "available", lambda mapped=0: between)
    monkeypatch.setattr(preview, "_needed", lambda model, settings: needs[settings.stream])
    if not streams:
        with pytest.raises(MspError, match=r"takes about [\d,]+ bytes of memory more, and [\d,]+ are free"):
            msp.prune(tmp_path / "dense", **options)
        return
    with pytest.warns(UserWarning, match="the model is streamed"):
        found = msp.prune(tmp_path / "dense", output=tmp_path / "out", **options)
    assert found.model is None
    assert (found.kl, found.allocation) == (expected.kl, expected.allocation)
    monkeypatch.setattr(preview, "available", lambda mapped=0: needs[True] - 1)
    with pytest.raises(MspError, match=r"one block at a time it is [\d,]+"):
        msp.prune(tmp_path / "dense", output=tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_streamed_says_so(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "dense")
    monkeypatch.setattr(preview, "AMPLE", ENOUGH)
    monkeypatch.setattr(preview, "available", lambda mapped=0: 0)
    with pytest.raises(MspError, match=r"one block at a time is no way out: .*level database"):
        msp.prune(tmp_path / "dense", output=tmp_path / "out", sparsity=0.5, pruner="sparsegpt", calibration=text)
    with pytest.raises(UsageError, match="dequantised"):
        msp.dry_run(tmp_path / "dense", sparsity=0.5, calibration=text, dequantise=True, **SMALL)


def test_a_limit_of_the_process_counts() -> None:
    script = (
        "import resource; from msp.base.host_memory import available; before = available();"
        "hard = resource.getrlimit(resource.RLIMIT_AS)[1];"
        "used = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1]) * 1024;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, hard)); print(before, available())"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after <= 50_000_000 < before


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_count_with_those_that_hold_them(version: int, tmp_path: Path) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    root = tmp_path / "cgroup"
    top = root / "memory" if version == 1 else root
    for folder, most, taken, cache in ((top / "outer", 900, 500, 100), (top / "outer" / "inner", "max", 50, 0)):
        folder.mkdir(parents=True)
        (folder / names[0]).write_text(f"{most}\n")
        (folder / names[1]).write_text(f"{taken}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")
    groups = tmp_path / "groups"
    groups.write_text("7:memory:/outer/inner\n1:cpu:/outer\n" if version == 1 else "0::/outer/inner\n")
    assert host_memory._rooms_of_groups(groups, root) == [500]


def test_hidden_states_take_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Options.parse(sparsity=0.5, device="cpu")
    monkeypatch.setattr(footprint, "available", lambda: 64 << 30)
    assert hidden_bytes(auto, 10) == 256 << 20
    assert hidden_bytes(auto, 2 << 30) == 1 << 30
    assert hidden_bytes(Options.parse(sparsity=0.5, device="cpu", hidden_bytes="1MB"), 10) == 10**6
    monkeypatch.setattr(footprint, "available", lambda: 100 << 20)
    assert hidden_bytes(auto, 10) == 50 << 20


def test_what_is_free_is_less_than_the_machine_has() -> None:
    assert 0 < available() < 1 << 50
    assert resource.getpagesize() <= host_memory.resident() < available() + (1 << 40)


def test_statistics_of_a_block_go_before_the_next_ones_come(tmp_path: Path) -> None:
    """Hessians of all blocks together are larger than the model."""
    save("llama", tmp_path / "dense")
    save_tokens(tokens(1, 4000, seed=1)[0], tmp_path / "tokens.safetensors")
    held: list[weakref.ref[LinearStatistics]] = []

    @dataclass(frozen=True)
    class Watching(SparseGPTPruner):
        name = "watching"

        def prune(self, weight: Tensor, statistics: LinearStatistics, *args: Any, **options: Any) -> PackedWeight:
            alive = sum(reference() is not None for reference in held)
            assert alive <= 7, "more than those of one block"
            held.append(weakref.ref(statistics))
            return super().prune(weight, statistics, *args, **options)

    text = str(tmp_path / "tokens.safetensors")
    options = Options.parse(sparsity=0.5, calibration=text, allocator="uniform", **SMALL)
    opened = open_model(tmp_path / "dense", options, None, NoProgress())
    plan = opened.plan(options, NoProgress())
    bench = opened.bench(plan, opened.tokens(options, 0), options, NoProgress())
    allocation = Allocation({linear.name: NMPattern(4, 8) for linear in bench.linears})
    with bench.pruned(allocation, Watching()):
        assert len(held) == 14
        assert not any(reference() for reference in held)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"
        ),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_no_more_memory_is_told_as_such(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(msp, "evaluate", fails)
    (tmp_path / "text.txt").write_text("w5 w6")
    found = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--evaluate", str(tmp_path / "text.txt")])
    assert found.exit_code == 1
    assert "the memory does not suffice" in found.output and "--dry-run" in found.output


def test_the_peak_is_that_of_this_program_and_not_of_the_one_that_started_it() -> None:
    child = "from msp.base.host_memory import peak, resident; print(peak(), resident())"
    held = "held = bytearray(b'x') * 600_000_000"
    script = f"import subprocess, sys; {held}; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    most, now = map(int, done.stdout.split())
    assert now <= most + (1 << 20) and most < 400_000_000
