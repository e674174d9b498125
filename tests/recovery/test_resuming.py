"""A training that was interrupted goes on to the same bits, and files of another training are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_points import killed_at_every_step
from pairs import METHODS, pair, schedule, state, task
from torch import Tensor

from msp.errors import MspError
from msp.recovery import get_recovery, training
from msp.recovery.checkpoints import STATE, WHOLE, Measured, WorkFolder, check_resumable, newest_whole, remove
from msp.recovery.training import Recovered, recover

IDENTITY = {"weights": "xxh3:1", "seed": "0"}
LONG = schedule(epochs=2, measurements=4)


class Interrupted(Exception):
    pass


def run(method: str, folder: Path | None = None, *, after: int | None = None) -> tuple[Recovered, dict[str, Tensor]]:
    """A recovery, interrupted at the forward number ``after`` of the training."""
    student, teacher = pair("llama")
    recovery = get_recovery(method)
    job, forwards = task(student, teacher), 0

    class Interrupting:
        name, learning_rate = method, recovery.learning_rate
        parameters, merge = staticmethod(recovery.parameters), staticmethod(recovery.merge)

        @staticmethod
        def phases(task: Any) -> Any:
            for phase in recovery.phases(task):

                def loss(batch: int, phase: Any = phase) -> Tensor:
                    nonlocal forwards
                    forwards += 1
                    if forwards == after:
                        raise Interrupted
                    return phase.loss(batch)

                yield type(phase)(phase.name, phase.parameters, loss, phase.measure)

    before = state(student)
    try:
        work = None if folder is None else WorkFolder(folder, IDENTITY, resume=(folder / STATE).exists())
        return recover(Interrupting(), job, LONG, work), state(student)
    except Interrupted:
        assert all(torch.equal(each, before[name]) for name, each in state(student).items())
        raise


def same(one: tuple[Recovered, dict[str, Tensor]], other: tuple[Recovered, dict[str, Tensor]]) -> bool:
    return one[0] == other[0] and all(torch.equal(each, other[1][name]) for name, each in one[1].items())


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest) -> tuple[str, tuple[Recovered, dict[str, Tensor]]]:
    """A method, and what it gives if nothing interrupts it."""
    return request.param, run(request.param)


def test_files_change_nothing(whole: Any, tmp_path: Path) -> None:
    method, expected = whole
    assert expected[0].kept
    assert same(run(method, tmp_path), expected)


def test_an_interrupted_training_goes_on_to_the_same_bits(whole: Any, tmp_path: Path) -> None:
    method, expected = whole
    # in the first steps; between two checkpoints; twice; for blockwise also in its second block
    for number, interruptions in enumerate([[2], [11], [7, 6], [16, 3, 14][: 3 if method == "blockwise" else 1]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for after in interruptions:
            with pytest.raises(Interrupted):
                run(method, folder, after=after)
        assert same(run(method, folder), expected)


def test_a_resumed_training_does_not_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run("distil", tmp_path, after=14)
    with pytest.raises(Interrupted):  # 12 of the 16 steps are in the checkpoint
        run("distil", tmp_path, after=4)
    run("distil", tmp_path, after=5)
    run("distil", tmp_path, after=1)  # all is done, so that there is no step


def test_a_long_phase_has_checkpoints_between_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("distil")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Interrupted):  # the first measurement is after step 4
        run("distil", tmp_path, after=4)
    assert {each.name for each in (tmp_path / "phase-000").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert same(run("distil", tmp_path), expected)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:659]")):

        def fails(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("safetensors.torch.save_file", fails)
        with pytest.raises(MspError, match=r"phase-000 cannot be written: (No space|.*inline_container)"):
            run("distil", tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("distil", tmp_path)


def test_training_losses_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    every = run("distil")[0].phases[0].losses
    assert [each.step for each in every] == list(range(1, 17))
    monkeypatch.setattr(training, "MOST_LOSSES", 3)
    few = run("distil")[0].phases[0].losses
    assert [each.step for each in few] == [6, 12, 16]
    assert few[1].loss == pytest.approx(sum(each.loss for each in every[6:12]) / 6)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["distil", "blockwise"])
def test_killed_at_steps_on_the_disk(method: str, tmp_path: Path) -> None:
    expected, kills = run(method), 0
    for _ in killed_at_every_step(lambda: run(method, tmp_path), tmp_path, every=13, first=5):
        kills += 1
    assert kills > 2
    assert same(run(method, tmp_path), expected)


def test_a_checkpoint_that_is_not_whole_is_not_used(tmp_path: Path) -> None:
    expected = run("distil")
    with pytest.raises(Interrupted):
        run("distil", tmp_path, after=14)
    checkpoints = tmp_path / "phase-000"
    assert {each.name for each in checkpoints.iterdir()} == {"checkpoint-8", "checkpoint-12"}
    (checkpoints / "checkpoint-12" / WHOLE).unlink()
    weights = checkpoints / "checkpoint-8" / "model.safetensors"
    assert newest_whole(checkpoints) == checkpoints / "checkpoint-8"
    assert not (checkpoints / "checkpoint-12").exists()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert newest_whole(checkpoints) is None
    assert same(run("distil", tmp_path), expected)


def test_random_numbers_of_the_caller_go_on(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1)
    student, teacher = pair("llama")
    torch.manual_seed(1)
    recover(get_recovery("norms"), task(student, teacher), schedule(epochs=1))
    assert drawn() == expected


def test_files_of_another_training_are_refused(tmp_path: Path) -> None:
    assert not check_resumable(tmp_path, IDENTITY)
    with pytest.raises(Interrupted):
        run("norms", tmp_path, after=9)
    assert check_resumable(tmp_path, {"seed": "0"})
    with pytest.raises(MspError, match=r"another recovery: seed 1, was 0; start anew"):
        check_resumable(tmp_path, {"seed": "1"})
    with pytest.raises(MspError, match="the weights differ"):
        WorkFolder(tmp_path, {**IDENTITY, "weights": "xxh3:2"}, resume=True)
    with pytest.raises(MspError, match="teacher"):
        WorkFolder(tmp_path, {**IDENTITY, "teacher": "other"}, resume=True)
    WorkFolder(tmp_path, {**IDENTITY, "seed": "1"}, resume=False)  # begins anew
    assert {each.name for each in tmp_path.iterdir()} == {STATE}
    remove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    run("norms", tmp_path)
    file, best = tmp_path / STATE, tmp_path / "phase-000.safetensors"
    content = file.read_text()
    for wrong in (
        "{",
        "[]",
        content.replace('"step": 0', '"step": 1', 1),
        json.dumps({**json.loads(content), "finished": [1]}),
        json.dumps({"identity": IDENTITY}),
    ):
        file.write_text(wrong)
        with pytest.raises(MspError, match=STATE):
            WorkFolder(tmp_path, IDENTITY, resume=True)
    file.write_text(content)
    data = best.read_bytes()
    for wrong_bytes in (b"", data[:40], data[:-1] + bytes([data[-1] ^ 1])):
        best.write_bytes(wrong_bytes)
        with pytest.raises(MspError, match="damaged"):
            run("norms", tmp_path)
    best.unlink()
    with pytest.raises(MspError, match="not what this phase wrote"):
        run("norms", tmp_path)


def test_losses_that_are_not_finite_are_written(tmp_path: Path) -> None:
    student, teacher = pair("llama")
    work = WorkFolder(tmp_path, IDENTITY, resume=False)
    found = recover(get_recovery("norms"), task(student, teacher), schedule(learning_rate=1e30), work)
    again = WorkFolder(tmp_path, IDENTITY, resume=True)
    assert found.phases[0].history[0] == again.finished[0].history[0]
    assert str(again.finished[0].history[-1]) == str(Measured(found.phases[0].steps, float("nan")))
