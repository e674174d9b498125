"""Trains the phases of a recovery: the loop is transformers' ``Trainer``, and a held-out loss decides what is kept."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from msp.base.files import unwritable
from msp.base.progress import Advance, Progress
from msp.base.readable import duration
from msp.errors import MspError, UsageError, first_line
from msp.recovery.base import Phase, Recovery, Task, as_saved, in_rows, put, snapshot, training
from msp.recovery.checkpoints import FinishedPhase, Measured, WorkFolder, mark_whole, newest_whole

if TYPE_CHECKING:
    from transformers import Trainer

# Seconds between two checkpoints of a long phase; each held-out loss comes with a checkpoint too.
CHECKPOINT_SECONDS = 120.0
MOST_LOSSES = 200


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a phase trains.

    Attributes:
        epochs: passes over the batches.
        accumulate: forwards whose gradients are added up for one step.
        learning_rate: the highest learning rate of AdamW; it falls to 0 along a cosine.
        evaluations: how often a phase measures the held-out loss, evenly over its steps.
        seed: the seed of the order of the batches.
    """

    epochs: int
    accumulate: int
    learning_rate: float
    evaluations: int
    seed: int


@dataclass(frozen=True)
class Recovered:
    """The held-out loss of a model before and after its recovery, in nats per predicted token.

    Attributes:
        kept: whether the trained parameters were kept; without a gain the model is as it was.
        phases: what happened in each phase.
    """

    before: float
    after: float
    kept: bool
    phases: list[FinishedPhase]


def check_trainer() -> None:
    """Raise ``MspError`` if the Trainer lacks its library, and ``UsageError`` if several processes are to train."""
    if find_spec("accelerate") is None:
        raise MspError("recovery trains with accelerate: pip install 'mixed-sparsity-pruning[recover]'")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("recovery in several processes is not built: start it without accelerate launch or torchrun")


def recover(recovery: Recovery, task: Task, schedule: Schedule, work: WorkFolder | None = None) -> Recovered:
    """Train the student of ``task``; it then has the best parameters by the held-out loss, or those of the start.

    All parameters that change are rounded to the dtypes in which they are stored before each measurement, so that the
    losses are those of the saved model.

    Args:
        work: the files to go on from, and to write to; None keeps everything in memory.

    Raises:
        MspError: the files are damaged, or the held-out loss of the start is not finite.
    """
    with in_rows(task.student):
        return _recovered(recovery, task, schedule, work)


def _recovered(recovery: Recovery, task: Task, schedule: Schedule, work: WorkFolder | None) -> Recovered:
    parameters = recovery.parameters(task.student)
    if not parameters:
        raise MspError(f"the model has no parameters that {recovery.name} trains")
    start, before = snapshot(parameters), task.held_out_loss()
    if not math.isfinite(before):
        raise MspError(f"the held-out loss of the pruned model is {before}: no training is judged by that")
    phases: list[FinishedPhase] = []
    try:
        with training(task.student, {}), closing(_generator(recovery.phases(task))) as drawn:
            for number, phase in enumerate(drawn):
                phases.append(_finished(number, phase, work) or _train(number, phase, task, schedule, work))
        recovery.merge(task.student)
        after = task.held_out_loss()
    except BaseException:
        put(parameters, start)
        raise
    kept = after < before
    if not kept:
        put(parameters, start)
        after = before
    return Recovered(before, after, kept, phases)


def _generator(phases: Iterator[Phase]) -> Any:
    """``phases`` as a generator, which can be closed."""
    yield from phases


def _finished(number: int, phase: Phase, work: WorkFolder | None) -> FinishedPhase | None:
    """A phase that an earlier run finished, with its parameters in the model; None if it did not."""
    if work is None or number >= len(work.finished):
        return None
    best = work.best(number)
    if best is None or best[0].keys() != dict(phase.parameters).keys():
        raise MspError(f"{work.best_file(number)} is not what this phase wrote: start anew without resume")
    put(phase.parameters, best[0])
    return work.finished[number]


def _train(number: int, phase: Phase, task: Task, schedule: Schedule, work: WorkFolder | None) -> FinishedPhase:
    def measure() -> float:
        with as_saved(phase.parameters, task.stored):
            return phase.measure()

    best = _Best(number, phase, task, work)
    before = measure()
    best.offer(Measured(0, before))
    with ExitStack() as stack:
        stack.enter_context(training(task.student, phase.parameters))
        stack.enter_context(_same_random_numbers())
        if work is None:
            folder, checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="msp-"))), None
        else:
            folder = work.trainer_folder(number)
            checkpoint = newest_whole(folder)
        tokens = sum(batch.numel() for batch in task.batches) * schedule.epochs
        watch = _Watch(best, measure, tokens, schedule.evaluations, task.progress, saves=work is not None)
        trainer = _trainer(phase, task, schedule, folder, watch.callback())
        with task.progress.stage(phase.name) as watch.advance, _writing(folder):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps = int(trainer.state.global_step)
    put(phase.parameters, best.values)
    losses = _thinned([entry for entry in trainer.state.log_history if "loss" in entry])
    history = [Measured(0, before), *watch.history(trainer.state.log_history)]
    finished = FinishedPhase(phase.name, before, best.measured.loss, best.measured.step, steps, history, losses)
    if work is not None:
        work.finish(finished)
    return finished


def _thinned(log: list[dict[str, Any]]) -> list[Measured]:
    """At most ``MOST_LOSSES`` training losses: the mean of each stretch of steps, at its last step."""
    every = math.ceil(len(log) / MOST_LOSSES) or 1
    stretches = [log[start : start + every] for start in range(0, len(log), every)]
    return [Measured(int(each[-1]["step"]), math.fsum(e["loss"] for e in each) / len(each)) for each in stretches]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """``MspError`` for a checkpoint in ``folder`` that cannot be written, on a full disk say."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error
    except RuntimeError as error:
        if "inline_container" in str(error) or "iostream" in str(error):  # torch.save has no error of its own
            raise MspError(f"{folder} cannot be written: {first_line(error)}") from error
        raise


class _Best:
    """The best parameters of a phase so far, in host memory and in the work folder."""

    def __init__(self, number: int, phase: Phase, task: Task, work: WorkFolder | None) -> None:
        self._number = number
        self._phase = phase
        self._stored = task.stored
        self._work = work
        self.values: Mapping[str, Tensor] = {}
        self.measured = Measured(0, math.inf)
        found = None if work is None else work.best(number)
        if found is not None:  # an earlier run measured it: this one finds the same loss at the same step
            self.values, self.measured = found

    def offer(self, measured: Measured) -> None:
        """Keep the current parameters, rounded as they are saved, if their loss is the lowest."""
        if self.values and not measured.loss < self.measured.loss:
            return
        with as_saved(self._phase.parameters, self._stored):
            self.values = snapshot(self._phase.parameters)
        self.measured = measured
        if self._work is not None:
            self._work.save_best(self._number, self.values, measured)


class _Watch:
    """Shows the progress of a phase, measures the held-out loss, and asks for checkpoints."""

    advance: Advance

    def __init__(
        self, best: _Best, measure: Any, tokens: int, evaluations: int, progress: Progress, *, saves: bool
    ) -> None:
        self._best = best
        self._measure = measure
        self._tokens = tokens
        self._evaluations = evaluations
        self._saves = saves
        self._first = 0
        self._started = self._saved = time.monotonic()
        self._loss = math.nan

    def callback(self) -> Any:
        """The callback for the Trainer."""
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch._first, watch._started = state.global_step, time.monotonic()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch._step(state, control)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                watch._show(state, logs or {})

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")
                watch._saved = time.monotonic()

        return Callback()

    @staticmethod
    def history(log: list[dict[str, Any]]) -> list[Measured]:
        """The held-out losses in the log of the Trainer, which its checkpoints hold too."""
        return [Measured(int(entry["step"]), float(entry["held_out"])) for entry in log if "held_out" in entry]

    def _step(self, state: Any, control: Any) -> None:
        every = max(1, math.ceil(state.max_steps / self._evaluations))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            measured = Measured(state.global_step, self._measure())
            state.log_history.append({"step": measured.step, "held_out": measured.loss})
            self._best.offer(measured)
            control.should_save = self._saves
        elif self._saves and time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            control.should_save = True

    def _show(self, state: Any, logs: Mapping[str, Any]) -> None:
        self._loss = float(logs.get("loss", self._loss))
        step, steps = state.global_step, state.max_steps
        seconds, done = time.monotonic() - self._started, max(1, step - self._first)
        figures = {
            "loss": self._loss,
            "held_out": self._best.measured.loss,
            "tokens/s": done * self._tokens / steps / max(seconds, 1e-9),
            "left": duration(seconds / done * (steps - step)),
        }
        self.advance(step, steps, **figures)


class _Trainee(nn.Module):
    """The module that the Trainer trains: its parameters are those of the phase, its forward returns the loss.

    The model itself is no submodule. So a checkpoint holds the trained parameters alone, and the model stays in
    evaluation mode: dropout would make the first step start from another model than the pruned one.
    """

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.trained = nn.ParameterList(phase.parameters.values())
        self._loss = phase.loss

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self._loss(int(batch))}


class _Numbers(Dataset[int]):
    """The numbers of the batches; the phase has the batches themselves."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


def _only(numbers: list[int]) -> dict[str, Tensor]:
    (number,) = numbers
    return {"batch": torch.tensor(number)}


def _trainer(phase: Phase, task: Task, schedule: Schedule, folder: Path, callback: Any) -> Trainer:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        optim="adamw_torch",
        seed=schedule.seed % 2**32,
        use_cpu=task.device.type == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # The device is one; without this the Trainer would copy the model to all GPUs that it sees.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainee: Any = _Trainee(phase)
    trainer = Trainer(
        trainee, arguments, data_collator=_only, train_dataset=_Numbers(len(task.batches)), callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log to standard output
    return trainer


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The Trainer seeds all generators; the caller's go on afterwards as if it had not."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
