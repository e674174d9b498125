"""The search on several workers: what one process finds, also when workers or the driver die."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, nm_units, save, tokens

import msp
from msp import ops
from msp.base.progress import NoProgress
from msp.compressions.nm import NMCompression
from msp.engine.distributed import Workers, prepare_environment, ray_runner
from msp.engine.fitness import Job
from msp.engine.runners import Setting, open_runner
from msp.errors import MspError, UsageError
from msp.evidence.evaluate import DenseReference
from msp.models.structure import find_structure

GROUP, BATCHES = 8, 12
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'mixed-sparsity-pruning[ray]'"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What a worker has: with another number of threads a sum may end on another last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    prepare_environment()
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def setting(family: str = "llama", dtype: torch.dtype = torch.float32) -> Setting:
    """Fresh random weights, tokens and ranks on every call."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    model = build(family, seed, dtype)
    structure = find_structure(model)
    linears = [linear for linear in structure.linears if linear.shape[1] % GROUP == 0]
    ranks = {linear.name: {GROUP: ops.nm_rank(linear.weight.contiguous(), GROUP)} for linear in linears}
    reference = DenseReference(model, tokens(2 * BATCHES - 1, 17, seed), batch_size=2)
    return Setting(model, structure, NMCompression(structure, ranks), nm_units(linears, GROUP), reference)


def jobs(of: Setting, count: int) -> list[Job]:
    """Random candidates on random batches in random order."""
    rng = np.random.default_rng()
    return [
        Job(
            tuple(rng.integers(0, GROUP + 1, len(of.units)).tolist()),
            tuple(rng.permutation(BATCHES)[: rng.integers(0, BATCHES + 1)].tolist()),
        )
        for _ in range(count)
    ]


@needs_ray
@pytest.mark.parametrize(
    ("family", "dtype", "large", "count"),
    [
        ("gpt2", torch.float32, False, 2),
        ("gpt2", torch.float32, True, 1),
        ("llama-tied", torch.bfloat16, False, 1),
        ("llama-tied", torch.bfloat16, True, 1),
    ],
)
def test_workers_find_what_this_process_does_to_the_last_bit(
    ray, family: str, dtype: torch.dtype, large: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 1)
    parts = setting(family, dtype)
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    asked = jobs(parts, 9)
    with open_runner(parts) as local:
        expected = local.run(asked)
    with open_runner(parts, Workers(count)) as runner:
        assert runner.batches == BATCHES
        assert runner.run([]) == []
        assert runner.run(asked) == expected
        assert runner.run(asked[::-1]) == expected[::-1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.model.state_dict().items())


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "sparsity": 0.7,
        "calibration": str(folder / "text.txt"),
        "window": 16,
        "calibration_tokens": 128,
        "fitness_tokens": 16_384,
        "test_tokens": 64,
        "evaluations": 96,
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    save("llama", path / "model")
    words = np.random.default_rng(0).integers(3, 96, 40_000)
    (path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return path


@needs_ray
def test_the_same_search_on_any_number_of_workers(ray, folder: Path) -> None:
    alone, shared = (msp.search(**options(folder), workers=count) for count in (None, 3))
    assert len(alone.history) == 7
    assert shared.allocation == alone.allocation and shared.history == alone.history


def pids(ray: Any, runner: Any, count: int) -> dict[int, Any]:
    """The processes of all ``count`` workers, once they are up."""
    while len(runner._idle) < count:
        runner._await_one()
    return {ray.get(worker.__ray_call__.remote(lambda _: os.getpid())): worker for worker in runner._idle}


@needs_ray
def test_a_killed_worker_costs_only_what_it_was_running(ray) -> None:
    parts = setting()
    asked = jobs(parts, 20)
    with open_runner(parts) as local:
        expected = local.run(asked)
    with ray_runner(parts, Workers(2), NoProgress()) as runner:
        victim, survivor = pids(ray, runner, 2)
        # stopped, it gets something to run and cannot finish it before it is killed
        os.kill(victim, signal.SIGSTOP)
        killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
        killer.start()
        assert runner.run(asked) == expected
        killer.join()
        after = pids(ray, runner, 2)
        assert victim not in after and survivor in after
        # and between two calls
        os.kill(survivor, signal.SIGKILL)
        assert runner.run(asked) == expected


@needs_ray
def test_errors_and_deaths_that_running_again_does_not_mend(ray) -> None:
    parts = setting()
    deadly, wrong = (parts.reference.windows[2 * batch : 2 * batch + 2] for batch in (3, 5))

    def act(_: Any, __: Any, named: dict[str, Any]) -> None:
        if torch.equal(named["input_ids"], deadly):
            os._exit(9)
        if torch.equal(named["input_ids"], wrong):
            raise FloatingPointError("of its own kind")

    parts.model.register_forward_pre_hook(act, with_kwargs=True)
    with open_runner(parts, Workers(1)) as runner:
        (fine,) = runner.run([Job((4,) * len(parts.units), (0, 1))])
        assert fine.tokens == 4 * 17
        with pytest.raises(FloatingPointError, match=r"^of its own kind$"):
            runner.run([Job((4,) * len(parts.units), (5,))])
        with pytest.raises(MspError, match=r"died on the same candidate 3 times.*fewer workers"):
            runner.run([Job((4,) * len(parts.units), (0, 3))])


@needs_ray
def test_a_worker_that_cannot_begin_is_an_error(ray) -> None:
    parts = setting()
    parts.structure.linears[0].module.weight = None
    with pytest.raises(MspError, match="cannot begin"), open_runner(parts, Workers(1)):
        pass


@needs_ray
def test_more_workers_than_there_is_room_for(ray) -> None:
    with pytest.raises(MspError, match=r"room for 4 workers.* 5 are wanted"), open_runner(setting(), Workers(5)):
        pass


@needs_ray
def test_a_cluster_that_is_not_there_is_named() -> None:
    script = """
from msp.errors import MspError
from msp.engine.distributed import Workers, _session
for address in ("127.0.0.1:1", "nowhere:x"):
    try:
        with _session(Workers(address=address), 1):
            raise SystemExit("reached")
    except MspError as error:
        assert address in str(error), error
"""
    subprocess.run([sys.executable, "-c", script], env=ONE_THREAD, check=True)


def workers_of(driver: int) -> set[int]:
    """Processes under ``driver``, running ones, that hold a model."""
    parents: dict[int, int] = {}
    workers = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if b"CandidateWorker" in (folder / "cmdline").read_bytes():
                workers.add(int(folder.name))
    return {pid for pid in workers if parents.get(parents[pid]) == driver}


def alive(pid: int) -> bool:
    # a dead process that nobody has asked about has no command line any more
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 900) -> None:
    """Until ``condition`` holds; the limit is for what will never come, on a machine as busy as may be."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} in {seconds} seconds"
        time.sleep(0.02)


@needs_ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_driver_goes_on_from_its_last_generation(ray, folder: Path, tmp_path: Path) -> None:
    checkpoint, log = tmp_path / "work" / "search.json", tmp_path / "log"
    asked = options(folder, evaluations=320, work_dir=checkpoint.parent)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items() if name != "model"]
    command = [
        sys.executable,
        "-m",
        "msp",
        "search",
        asked["model"],
        f"--output={tmp_path / 'out'}",
        "--workers=2",
        *given,
    ]

    def generation() -> int:
        return int(json.loads(checkpoint.read_text())["generation"]) if checkpoint.exists() else -1

    with log.open("wb") as out:
        driver = subprocess.Popen(command, stdout=out, stderr=out, env=ONE_THREAD)
    wait_for(lambda: generation() >= 2 or driver.poll() is not None, "second generation")
    workers = workers_of(driver.pid)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL and len(workers) == 2, log.read_text()
    # our own lines, and none of Ray's: theirs begin with a time in brackets, or with (raylet) and the like
    assert "Starting workers" in log.read_text() and not set(log.read_text()) & set("[]()")
    wait_for(lambda: not any(map(alive, workers)), "end of the workers of a dead driver")

    assert generation() < 20
    resumed = msp.search(**asked, resume=True)  # in one process now
    whole = msp.search(**options(folder, evaluations=320))
    assert resumed.allocation == whole.allocation
    assert resumed.history == whole.history


def test_workers_without_ray_are_refused_before_any_work(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    for asked in ({"workers": 2}, {"ray_address": "auto"}):
        with pytest.raises(UsageError, match=r"pip install 'mixed-sparsity-pruning\[ray\]'"):
            msp.prune("no-such-model", sparsity=0.5, **asked)


@needs_ray
@pytest.mark.parametrize("count", [0, -1])
def test_no_workers_at_all_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match="at least one"):
        msp.compare("no-such-model", sparsity=0.5, allocators=["msp"], workers=count)


def test_one_process_does_not_import_ray(folder: Path) -> None:
    script = f"""
import sys
import msp
msp.search(**{ {**options(folder), "evaluations": 16}!r})
assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]
"""
    subprocess.run([sys.executable, "-c", script], env=ONE_THREAD, check=True)
