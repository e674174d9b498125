"""Train what a packed model has kept until it predicts like the dense one again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msp.base.files import name_alone
from msp.base.host_memory import give_back, peak
from msp.base.identity import Identity, environment, hashed, hashed_code, hashed_config, hashed_data, hashed_tensors
from msp.base.outputs import check_room, reserved, working_folder
from msp.base.progress import NoProgress, Progress
from msp.evidence.evaluate import DenseReference
from msp.evidence.fisher import frozen
from msp.models.loading import LoadedModel
from msp.packed.checkpoint import as_stored, save_packed
from msp.recovery import Task
from msp.recovery.base import in_rows
from msp.recovery.checkpoints import STATE, WorkFolder, check_resumable
from msp.recovery.training import recover as train
from msp.session.declarations import documented
from msp.session.opened import vocabulary_size, window_of
from msp.session.recover_arguments import RecoverArguments
from msp.session.recover_options import RecoverOptions
from msp.session.recoverable import Pair, name_of, pair
from msp.session.results import RecoverResult
from msp.session.workbench import batch_size
from msp.text.text_sources import TokenSource
from msp.text.training_sets import TrainingSets, make_training_sets
from msp.verbs._runs import Stopwatch

if TYPE_CHECKING:
    from typing_extensions import Unpack

HELD_OUT = " (held out)"
# For each trained value: three checkpoints with two numbers of AdamW, and the best values, all in fp32.
CHECKPOINT_BYTES = 40


@documented(RecoverArguments)
def recover(
    model: Any,
    *,
    teacher: Any,
    output: str | Path | None = None,
    force: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **arguments: Unpack[RecoverArguments],
) -> RecoverResult:
    """Train a packed model under its mask, with the dense model as its teacher.

    The storage stays as it is: the same mask, the same patterns, the same bytes. Only kept values, norms and biases
    change. A held-out loss decides which values are kept; without a gain the model stays as it was.

    Args:
        model: a packed model: a directory, a hub id, or a model object in float32 (which is trained in place).
        teacher: the dense model that ``model`` was pruned from: a directory, a hub id, or a model object in float32.
        output: the directory to save the model to. No other run can write to it, or to ``work_dir``, during the run.
        force: replace the directory ``output`` if it exists and msp wrote all its files.
        tokenizer: the tokenizer of a model object.
        progress: the progress display.
        arguments: the options that are listed below.

    Raises:
        UsageError: the request is wrong. The error comes before the weights are loaded.
        MspError: a model, a text or a folder cannot be used, or the teacher has another vocabulary or other shapes.
    """
    options, listener, clock = RecoverOptions.parse(arguments), progress or NoProgress(), Stopwatch()
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(reserved(output, force, model=model, work_dir=options.work_dir))
        stack.enter_context(working_folder(options.work_dir))
        with clock("load"):
            found = pair(model, teacher, tokenizer, options)
            window = window_of(found.skeleton, options.window)
            sets = _tokens(found, options, window)
            asked = _asked(options, sets)
            _check_resume(options, asked)
            student, dense, structure = found.load(options, listener)
            stack.enter_context(frozen(dense))
            size = student.stored.nbytes(student.model)
            if output is not None:
                check_room(output, size, "the packed model")
            work = _work(options, {**asked, **_weights(student.model, dense)})
        # rows before the move: on a GPU a weight of several places would become several weights
        with in_rows(student.model):
            student.model.to(options.device)
            with clock("evaluate"):
                test = _reference(dense, sets.test, options, listener, "Dense test predictions")
                held_out = _reference(dense, sets.held_out, options, listener, "Dense held-out predictions")
                before = test.measure(student.model, progress=listener)
            together, _ = options.forwards(window)
            task = Task(
                student=student.model,
                teacher=dense,
                structure=structure,
                batches=torch.split(sets.training, together),
                held_out=torch.split(sets.held_out, together),
                reference=held_out,
                weights=options.weights,
                stored=student.stored,
                device=options.device,
                hidden_bytes=options.hidden_bytes,
                progress=listener,
            )
            parameters = sum(each.numel() for each in options.method.parameters(student.model).values())
            if options.work_dir is not None:
                check_room(options.work_dir, CHECKPOINT_BYTES * parameters, "the checkpoints of the training")
            with clock("train"):
                trained = train(options.method, task, options.schedule(window), work)
            del task, held_out
            give_back()
            with clock("evaluate"):
                # the values are those of the files already: ``train`` rounds what it keeps
                after = test.measure(student.model, progress=listener) if trained.kept else before
        figures = {
            "held_out_loss": {"before": trained.before, "after": trained.after},
            "perplexity": {"dense": test.quality.perplexity, "before": before.perplexity, "after": after.perplexity},
            "kl": {"before": before.kl, "after": after.kl},
        }
        entry = {
            "method": options.method.name,
            "teacher": name_alone(name_of(teacher)),
            "tokens": sets.training.numel() * options.epochs,
            "epochs": options.epochs,
            "learning_rate": options.method.learning_rate,
            "kl_weight": options.weights.kl,
            "batch_tokens": options.batch_tokens,
            "seed": options.seed,
            "parameters": parameters,
            "kept": trained.kept,
            **figures,
            "text": sets.sources,
        }
        recipe = _recipe(found.recipe, entry, figures)
        if output is not None:
            with clock("save"):
                _save(student, output, recipe, force)
    return RecoverResult(
        method=options.method.name,
        tokens=sets.training.numel() * options.epochs,
        parameters=parameters,
        kept=trained.kept,
        **figures,
        bytes=size,
        seconds=clock.seconds,
        peak_memory=peak(),
        phases=[asdict(phase) for phase in trained.phases],
        recipe=recipe,
        model=student.model,
        tokenizer=student.tokenizer,
    )


def _tokens(found: Pair, options: RecoverOptions, window: int) -> TrainingSets:
    """The token sets; the tokens on which the packed model was tested are not trained on."""
    together, count = options.forwards(window)
    told = found.recipe.get("calibration")
    left_out = 0
    if isinstance(told, Mapping) and isinstance(told.get("evaluate"), str):
        tested, trained = told["evaluate"], TokenSource.parse(options.calibration).shown
        if tested == f"{trained}{HELD_OUT}" and isinstance(told.get("test_tokens"), int):
            left_out = -(-told["test_tokens"] // window)
        elif tested == trained:
            warnings.warn(
                f"{trained} has the name of the text that the packed model was tested on: figures on it say nothing "
                "after a training on it",
                stacklevel=3,
            )
    return make_training_sets(
        options.calibration,
        found.tokenizer,
        vocabulary_size(found.skeleton),
        window=window,
        training=together * count,
        held_out=max(1, options.held_out_tokens // window),
        test=max(1, options.test_tokens // window),
        evaluate=options.evaluate,
        left_out=left_out,
        seed=options.seed,
    )


def _asked(options: RecoverOptions, sets: TrainingSets) -> Identity:
    """The part of the identity of a training that does not need the weights."""
    method = options.method
    found = {"method": repr(method)}
    if not type(method).__module__.startswith("msp."):
        found["sources of the method"] = hashed_code(method)
    return {
        **found,
        "KL weight": str(options.weights.kl),
        "epochs": str(options.epochs),
        "batch tokens": str(options.batch_tokens),
        "forward tokens": str(options.forward_tokens),
        "measurements": str(options.measurements),
        "seed": str(options.seed),
        "training tokens": hashed(sets.training),
        "held-out tokens": hashed(sets.held_out),
        "threads": str(torch.get_num_threads()),
        **environment(options.device),
    }


def _weights(student: Any, dense: Any) -> Identity:
    """The part of the identity of a training that needs the weights."""
    found = {"weights": student, "weights of the teacher": dense}
    hashes = {name: hashed_data(hashed_tensors(model.state_dict(keep_vars=True))) for name, model in found.items()}
    return {**hashes, "model settings": hashed_config(dense.config)}


def _check_resume(options: RecoverOptions, asked: Identity) -> None:
    """Raise an error before any weights are read if another training left the files; warn if there are none."""
    if options.resume:
        assert options.work_dir is not None, "RecoverOptions.parse refuses that"
        if not check_resumable(options.work_dir, asked):
            warnings.warn(f"nothing to resume in {options.work_dir}: the training starts anew", stacklevel=3)


def _work(options: RecoverOptions, identity: Identity) -> WorkFolder | None:
    if options.work_dir is None:
        return None
    if not options.resume and (options.work_dir / STATE).exists():
        warnings.warn(f"{options.work_dir}: the checkpoints of an earlier training are replaced", stacklevel=3)
    return WorkFolder(options.work_dir, identity, resume=options.resume)


def _reference(dense: Any, windows: Tensor, options: RecoverOptions, progress: Progress, label: str) -> DenseReference:
    size = batch_size(options.device, windows.shape[1])
    return DenseReference(dense, windows, batch_size=size, progress=progress, label=label)


def _recipe(
    recipe: Mapping[str, Any], entry: dict[str, Any], figures: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The recipe of the packed model with a new entry ``recovery``; an entry of an earlier recovery is in it."""
    if "recovery" in recipe:
        entry = {**entry, "earlier": recipe["recovery"]}
    of = figures["perplexity"]
    perplexity = {"dense": of["dense"], "pruned": of["before"], "recovered": of["after"]}
    return {**recipe, "perplexity": perplexity, "kl": figures["kl"]["after"], "recovery": entry}


def _save(student: LoadedModel, output: str | Path, recipe: Mapping[str, Any], force: bool) -> None:
    with as_stored(student.model, student.stored):
        save_packed(student.model, student.tokenizer, output, recipe=recipe, force=force, origin=student.folder)
