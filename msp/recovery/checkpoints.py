"""The files from which an interrupted recovery goes on: its state, its finished phases, the Trainer's checkpoints.

A work folder holds ``recovery.json`` (the identity and the finished phases), ``phase-000.safetensors`` ... (the best
parameters of each phase so far), and ``phase-000/checkpoint-100`` ... (the Trainer's own files).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from msp.base.files import write_tensors, write_text
from msp.base.identity import Identity, differences, hashed, hashed_data, hashed_tensors
from msp.base.reading import array, read_json, real, table, text, whole
from msp.base.staging import sync
from msp.errors import MspError

STATE = "recovery.json"
# Written into a checkpoint of the Trainer when it is complete: the hashes of its files.
WHOLE = "whole.json"


@dataclass(frozen=True)
class Measured:
    """A held-out loss: of the parameters after ``step`` steps of a phase. Step 0 is the start of the phase."""

    step: int
    loss: float


@dataclass(frozen=True)
class FinishedPhase:
    """A phase that is over.

    Attributes:
        name: the name of the phase.
        before: the held-out loss at its start.
        after: the held-out loss of the parameters that were kept.
        step: the step at which they stood; 0 if the start was kept.
        steps: all steps of the phase.
        history: the held-out losses.
        losses: the training losses, in nats per token or as a share: means over stretches of steps, at their last step.
    """

    name: str
    before: float
    after: float
    step: int
    steps: int
    history: list[Measured]
    losses: list[Measured]


class WorkFolder:
    """The files of one recovery.

    Args:
        folder: an existing folder, which no other run uses.
        identity: everything that the result depends on.
        resume: go on with the files of an earlier run. Without it, they are removed.

    Raises:
        MspError: the files are of another recovery (the message names the differences) or are damaged.
    """

    def __init__(self, folder: Path, identity: Identity, *, resume: bool) -> None:
        self._folder = folder
        self._identity = dict(identity)
        self.finished: list[FinishedPhase] = []
        self.resumed = resume and (folder / STATE).exists()
        if self.resumed:
            self.finished = _read(folder / STATE, identity)
        else:
            remove(folder)
            self._write()

    def best_file(self, phase: int) -> Path:
        """The file with the best parameters of a phase."""
        return self._folder / f"phase-{phase:03}.safetensors"

    def trainer_folder(self, phase: int) -> Path:
        """The folder of the Trainer's checkpoints of a phase."""
        return self._folder / f"phase-{phase:03}"

    def save_best(self, phase: int, values: Mapping[str, Tensor], measured: Measured) -> None:
        """Write the best parameters of a phase so far, with their step and loss, in one step."""
        metadata = {"step": str(measured.step), "loss": measured.loss.hex()}
        metadata["checksum"] = _checksum(values, metadata)
        write_tensors(dict(values), self.best_file(phase), metadata=metadata)

    def best(self, phase: int) -> tuple[dict[str, Tensor], Measured] | None:
        """What ``save_best`` wrote last; None if there is nothing.

        Raises:
            MspError: the file is damaged.
        """
        file = self.best_file(phase)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            values, checksum = load_file(file), metadata.pop("checksum")
            measured = Measured(int(metadata["step"]), float.fromhex(metadata["loss"]))
            if checksum != _checksum(values, metadata):
                raise ValueError("its checksum is another")
            return values, measured
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise MspError(f"{file} is damaged ({error}): start anew without resume") from error

    def finish(self, phase: FinishedPhase) -> None:
        """Note that a phase is over, and remove the Trainer's files of it."""
        self.finished.append(phase)
        self._write()
        shutil.rmtree(self.trainer_folder(len(self.finished) - 1), ignore_errors=True)

    def _write(self) -> None:
        content = {"identity": self._identity, "finished": [_written(phase) for phase in self.finished]}
        write_text(self._folder / STATE, json.dumps({"checksum": hashed_data(content), **content}))


def remove(folder: Path) -> None:
    """Remove the files of a recovery from its work folder."""
    for file in [folder / STATE, *folder.glob("phase-[0-9]*.safetensors")]:
        file.unlink(missing_ok=True)
    for checkpoints in folder.glob("phase-[0-9]*"):
        shutil.rmtree(checkpoints, ignore_errors=True)


def check_resumable(folder: Path, identity: Identity) -> bool:
    """Whether ``folder`` has the files of an earlier run.

    Raises:
        MspError: they are of another recovery, as far as ``identity`` tells.
    """
    if not (folder / STATE).exists():
        return False
    _read(folder / STATE, identity, partial=True)
    return True


def mark_whole(checkpoint: Path) -> None:
    """Mark a checkpoint as complete when all of its files have reached the disk."""
    sync(checkpoint)
    write_text(checkpoint / WHOLE, json.dumps(_hashes(checkpoint)))


def newest_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``. Others are removed: a run was killed while it wrote them."""
    found: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        step = checkpoint.name.rpartition("-")[2]
        if step.isdigit() and _is_whole(checkpoint):
            found[int(step)] = checkpoint
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return found[max(found)] if found else None


def _checksum(values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return hashed_data([hashed_tensors(values), dict(metadata)])


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(read_json(checkpoint / WHOLE) == _hashes(checkpoint))
    except (MspError, OSError):
        return False


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = (file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != WHOLE)
    return {str(file.relative_to(checkpoint)): _hash(file) for file in files}


def _hash(file: Path) -> str:
    if not file.stat().st_size:
        return hashed("")
    return hashed(torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8))


def _read(file: Path, identity: Identity, *, partial: bool = False) -> list[FinishedPhase]:
    try:
        content = table(read_json(file), "the file", ("checksum", "identity", "finished"))
        found = {key: text(value, f"identity: {key}") for key, value in table(content["identity"], "identity").items()}
        rest = {key: value for key, value in content.items() if key != "checksum"}
        if content["checksum"] != hashed_data(rest):
            raise MspError("its checksum is another: the file is damaged")
        finished = [_phase(entry, f"finished[{i}]") for i, entry in enumerate(array(content["finished"], "finished"))]
    except MspError as error:
        raise MspError(f"{file} is not the state of a recovery: {error}") from error
    if differs := differences(identity, found, partial=partial):
        raise MspError(f"{file} belongs to another recovery: {'; '.join(differs)}; start anew without resume")
    return finished


def _written(phase: FinishedPhase) -> dict[str, Any]:
    """A phase as JSON, which has no NaN: a loss that is not finite is written as ``null``."""
    entries = asdict(phase)
    for key in ("history", "losses"):
        for entry in entries[key]:
            entry["loss"] = entry["loss"] if math.isfinite(entry["loss"]) else None
    return entries


def _phase(value: object, name: str) -> FinishedPhase:
    entry = table(value, name, FinishedPhase.__dataclass_fields__)
    return FinishedPhase(
        text(entry["name"], f"{name}.name"),
        real(entry["before"], f"{name}.before"),
        real(entry["after"], f"{name}.after"),
        whole(entry["step"], f"{name}.step"),
        whole(entry["steps"], f"{name}.steps"),
        _measurements(entry["history"], f"{name}.history"),
        _measurements(entry["losses"], f"{name}.losses"),
    )


def _measurements(value: Any, name: str) -> list[Measured]:
    found = []
    for index, each in enumerate(array(value, name)):
        entry = table(each, f"{name}[{index}]", ("step", "loss"))
        loss = float("nan") if entry["loss"] is None else real(entry["loss"], f"{name}[{index}].loss")
        found.append(Measured(whole(entry["step"], f"{name}[{index}].step"), loss))
    return found
