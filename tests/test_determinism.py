"""The same question gives the same bytes: twice, on any number of threads, streamed, on workers, killed and resumed.

``MSP_DETERMINISM=large`` does all of it with wiki6m and more kills.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from families import save, save_text, shared, shared_model
from killing import bytes_below, run_and_kill, run_fresh, run_once
from safetensors.torch import load_file

from msp.base.outputs import MARK

LARGE = os.environ.get("MSP_DETERMINISM") == "large"
KILLS = 8 if LARGE else 2
WORKERS_SECONDS = 10.0
SMALL = {
    "--window": "16", "--calibration-tokens": "128", "--fitness-tokens": "512", "--test-tokens": "64",
    "--evaluations": "32",
}  # fmt: skip
WIKI = {
    "--window": "128", "--calibration-tokens": "8192", "--fitness-tokens": "4096", "--test-tokens": "2048",
    "--evaluations": "64",
}  # fmt: skip

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'mixed-sparsity-pruning[ray]'"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``text``."""
    path = tmp_path_factory.mktemp("determinism")
    if LARGE:
        (path / "model").symlink_to(shared_model("wiki6m"))
        shutil.copy(shared("data", "wikipedia-passages.jsonl"), path / "text.jsonl")
    else:
        save("llama", path / "model")
        save_text(path / "text.txt", 7)
    return path


def arguments(home: Path, verb: str, out: str, *more: str, **changed: str) -> list[str]:
    text = "text.jsonl" if LARGE else "text.txt"
    options = {**(WIKI if LARGE else SMALL), **changed}
    given = [part for name, value in options.items() for part in (name, value)]
    return [verb, "model", "-o", out, "--calibration", text, "--device", "cpu", "--json", *given, *more]


PRUNERS = {"wanda": (), "sparsegpt": ("--pruner", "sparsegpt")}


@pytest.fixture(scope="module")
def pruned(home: Path) -> Mapping[str, dict[str, Any]]:
    """By pruner: what an undisturbed run to the folder of its name says."""
    runs = {name: run_fresh(arguments(home, "prune", name, *more), home) for name, more in PRUNERS.items()}
    return {name: json.loads(run.stdout) for name, run in runs.items()}


def answer(said: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same, whatever it took."""
    return {name: value for name, value in said.items() if name not in ("seconds", "peak_memory")}


@pytest.mark.parametrize(("pruner", "threads"), [("wanda", "1"), ("wanda", "2"), ("wanda", "8"), ("sparsegpt", "8")])
def test_threads(pruner: str, threads: str, home: Path, pruned: Any) -> None:
    """One thread again is the same run twice. The name of OUT is another, and in none of its files."""
    out = f"{pruner}-on-{threads}"
    run = run_fresh(arguments(home, "prune", out, *PRUNERS[pruner]), home, OMP_NUM_THREADS=threads)
    assert bytes_below(home / out) == bytes_below(home / pruner)
    assert answer(json.loads(run.stdout)) == answer(pruned[pruner])


def test_another_place(home: Path, tmp_path: Path, pruned: Any) -> None:
    """Model and text under other folders, OUT elsewhere: no path is in a file."""
    shutil.copytree(home / "model", tmp_path / "far" / "model")
    text = "text.jsonl" if LARGE else "text.txt"
    shutil.copy(home / text, tmp_path / "far" / text)
    asked = arguments(home, "prune", str(tmp_path / "deep" / "out"))
    asked[asked.index("model")] = str(tmp_path / "far" / "model")
    asked[asked.index(text)] = str(tmp_path / "far" / text)
    run_once(asked, tmp_path)
    assert bytes_below(tmp_path / "deep" / "out") == bytes_below(home / "wanda")
    for file in (tmp_path / "deep" / "out").rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file


def same_weights(one: Path, other: Path) -> None:
    """Streaming writes a shard for each block, so files and the list of them differ, and nothing that is in them."""
    left, right = (
        {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()} for path in (one, other)
    )
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and bytes(tensor.contiguous().view(-1).numpy().tobytes()) == bytes(
            right[name].contiguous().view(-1).numpy().tobytes()
        ), name
    rest = [
        {name: value for name, value in bytes_below(path).items() if not name.startswith("model") and name != MARK}
        for path in (one, other)
    ]
    assert rest[0] == rest[1]


def test_streamed(home: Path, pruned: Any) -> None:
    """With room for few hidden states, so that candidates go in several groups."""
    run_once(arguments(home, "prune", "streamed", "--stream", "--hidden-bytes", "20MB" if LARGE else "20kB"), home)
    same_weights(home / "streamed", home / "wanda")


@needs_ray
@pytest.mark.parametrize("workers", ["1", "2"] if LARGE else ["2"])
def test_workers(workers: str, home: Path, pruned: Any) -> None:
    out = f"workers-{workers}"
    run_once(arguments(home, "prune", out, "--workers", workers), home)
    assert bytes_below(home / out) == bytes_below(home / "wanda")


KILLED: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "prune-database": ("prune", ("--pruner", "sparsegpt"), {}),
    "pareto": ("search", (), {"--sparsity": "0.5,0.75"}),
    "prune-streamed": ("prune", ("--stream",), {}),
    **({"prune": ("prune", (), {}), "search": ("search", (), {})} if LARGE else {}),
}


@pytest.mark.parametrize("what", [*KILLED, pytest.param("workers", marks=needs_ray)])
def test_killed_and_resumed(what: str, home: Path) -> None:
    verb, more, changed = KILLED.get(what, ("search", (), {}))
    seconds, whole = run_once(arguments(home, verb, f"{what}-whole", *more, **changed), home)
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    kills = KILLS
    if what == "workers":  # which find what one process finds, but start for many seconds before
        more, seconds, kills = ("--workers", "2"), seconds + WORKERS_SECONDS, KILLS if LARGE else 1
    asked = arguments(home, verb, f"{what}-killed", *more, **changed)
    # where a run is killed after all is written, OUT is there
    resume = ["--resume", "--force"] if verb == "prune" else ["--resume"]
    ended = run_and_kill(asked, home, seconds=seconds, kills=kills, draw=random.Random(seed), resume=resume)
    assert bytes_below(home / f"{what}-killed") == bytes_below(home / f"{what}-whole")
    assert answer(_without_effort(ended.stdout)) == answer(_without_effort(whole.stdout))


def _without_effort(said: str) -> dict[str, Any]:
    """Several budgets: each has seconds and memory of its own."""
    content: dict[str, Any] = json.loads(said)
    for part in content.get("results", {}).values():
        part.pop("seconds", None), part.pop("peak_memory", None)
    return content


def test_a_killed_comparison_is_begun_again(home: Path) -> None:
    """It keeps nothing, so nothing of it is resumed: the table is the same."""
    asked = arguments(home, "compare", "table.png", "--allocators", "uniform,msp", "--seeds", "1")
    seconds, whole = run_once(asked, home)
    picture = (home / "table.png").read_bytes()
    (home / "table.png").unlink()
    ended = run_and_kill(asked, home, seconds=seconds, kills=1, draw=random.Random(), resume=())
    rows = [
        [{name: value for name, value in row.items() if name != "seconds"} for row in json.loads(said)["rows"]]
        for said in (whole.stdout, ended.stdout)
    ]
    assert rows[0] == rows[1] and len(rows[0]) > 1
    assert (home / "table.png").read_bytes() == picture
