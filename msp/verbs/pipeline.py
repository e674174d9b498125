"""The verbs of msp: prune a dense model to a packed one, search, compare, measure sensitivities and evaluate."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msp import __version__
from msp.allocators import Allocated, Allocator, Problem, allocate, get_allocator
from msp.base.files import name_alone
from msp.base.finite import check_figures
from msp.base.host_memory import give_back, peak
from msp.base.outputs import check_results, check_room, check_temporary, reserved, working_folder
from msp.base.progress import NoProgress, Progress
from msp.compressions.nm_database import DATABASE
from msp.engine.fitness import key_of
from msp.engine.state import read_checkpoint
from msp.errors import MspError, UsageError
from msp.evidence.evaluate import DenseReference, Quality, Reference, Sums, perplexity
from msp.evidence.fisher import fisher_traces
from msp.formats.patterns import Allocation
from msp.models.loading import (
    check_dtype,
    find_device,
    load_model,
    local_folder,
    make_skeleton,
    read_causal_config,
    read_tokenizer,
)
from msp.models.narrow import computed_dtype
from msp.models.text_forward import run_text
from msp.ops import CodedWeight, PackedWeight
from msp.packed.checkpoint import as_stored, packed_shards, replace_linears, save_packed
from msp.packed.sparse_linear import SparseLinear, note_pattern
from msp.plan.plans import Plan
from msp.plan.recipe import ALLOCATION_FILES, write_allocation
from msp.pruners import Pruner, get_pruner
from msp.session.opened import Opened, open_model, vocabulary_size, window_of
from msp.session.preview import Preview, fitting, preview
from msp.session.results import CompareResult, CompareRow, PruneResult, SearchResult, SensitivityResult, mean_rows
from msp.session.settings import PruneOptions
from msp.session.streamed_workbench import StreamedWorkbench
from msp.session.workbench import Workbench, batch_size
from msp.text.token_sets import DEFAULT_EVALUATION, TokenSource, read_windows


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def prune(
    model: Any,
    *,
    sparsity: float | None = None,
    output: str | Path | None = None,
    force: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a causal LM to N:M sparsity with a level per unit, and pack it.

    Args:
        model: a directory, a hub id, or a model object (which is packed in place).
        sparsity: share of the linears' weights to remove, in (0, 1), unless the options give another budget.
        output: the directory to save the packed model to. No other run can write to it, or to ``work_dir``, during the
            run.
        force: replace the directory ``output`` if it exists and msp wrote all its files.
        tokenizer: the tokenizer of a model object.
        progress: the progress display.
        options: the other fields of ``PruneOptions``.

    Raises:
        UsageError: the request is wrong. The error comes before the model is loaded if the request alone shows it.
        MspError: a model, a text or a folder cannot be used.
    """
    settings = _options(sparsity, options)
    if output is None and settings.stream:
        raise UsageError("a streamed model is packed on disk, block by block: stream needs an output")
    settings = fitting(model, settings, may_stream=output is not None)
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(reserved(output, force, model=model, work_dir=settings.work_dir))
        stack.enter_context(_places(settings))
        return _prune(model, settings, output, force, tokenizer, progress or NoProgress())


def dry_run(
    model: str | Path, *, sparsity: float | None = None, progress: Progress | None = None, **options: Any
) -> Preview:
    """The plan of ``prune`` with the same options, and an estimate of its memory; no weights and no text are read.

    Raises:
        UsageError, MspError: the errors of ``prune`` that need neither the weights nor the text.
    """
    return preview(model, _options(sparsity, options), progress)


@contextmanager
def _places(settings: PruneOptions) -> Iterator[None]:
    """The folders that a search may write to, checked and locked."""
    in_temporary_folder = settings.work_dir is None and settings.database(get_pruner(settings.pruner))
    if settings.stream or in_temporary_folder:
        check_temporary()
    with working_folder(settings.work_dir):
        yield


def _prune(
    model: Any, settings: PruneOptions, output: str | Path | None, force: bool, tokenizer: Any, listener: Progress
) -> PruneResult:
    clock = _Stopwatch()
    with clock("load"):
        opened = open_model(model, settings, tokenizer, listener, may_stream=True)
        plan = opened.plan(settings, listener)
        if output is not None:
            check_room(output, opened.expected_bytes(plan), "the packed model")
        tokens = opened.tokens(settings, settings.seed)
    pruner = get_pruner(settings.pruner)
    bench = opened.bench(plan, tokens, settings, listener)
    problem = _problem(bench, pruner, settings, settings.seed)
    if settings.allocation is None:
        _check_resume(bench, [problem], pruner, settings)
    with ExitStack() as stack:
        stack.enter_context(opened.structure.changes.steady(opened.model))
        with clock("calibrate"):
            _ = bench.unreached  # warns before any long work
        with clock("evaluate"):
            reference = bench.predictions(tokens.test, "Dense test predictions")
        with clock("allocate"):
            found = _allocate(problem, settings)
            allocation = plan.allocation(found.levels)
        stored, origin = opened.loaded.stored, opened.loaded.folder
        problem.evidence.release()
        fitness = bench.reference(settings.measure) if found.history else None
        if output is not None:
            check_room(output, opened.bytes_of(allocation)["packed"], "the packed model")
        shards = None
        if isinstance(bench, StreamedWorkbench):
            assert output is not None
            size = opened.bytes_of(allocation)["packed"]
            shards = stack.enter_context(packed_shards(output, stored, size, force=force, origin=origin))
            with clock("prune"):
                packed, sums, on_fitness = bench.prune_to(shards, allocation, pruner, reference, fitness)
            _check_quality(reference.quality_of(sums), opened.model, reference, streamed=True)
        else:
            packed, sums, on_fitness = _pruned(bench, allocation, pruner, reference, fitness, clock)
        quality, searched = reference.quality_of(sums), _search_fitness(found, on_fitness, settings)
        for linear in bench.linears:
            if allocation[linear.name].is_dense:
                for module in linear.modules:
                    note_pattern(module, allocation[linear.name])
        replace_linears(opened.model, packed)
        del packed  # the model holds the packed weights, and is rounded to its stored dtype when it is saved
        bytes_ = {"dense": stored.dense_bytes, "packed": stored.nbytes(opened.model)}
        recipe = _recipe(settings, opened, bench, plan, found)
        recipe |= {"perplexity": _both(reference.quality, quality), "kl": quality.kl, "bytes": bytes_}
        recipe |= {"search_fitness": searched}
        if shards is not None:
            with clock("save"):
                shards.finish(opened.model, opened.loaded.tokenizer, recipe)
        elif output is not None:
            as_loaded = opened.structure.changes.undone(opened.model)
            with clock("save"), as_loaded, as_stored(opened.model, stored):
                save_packed(opened.model, opened.loaded.tokenizer, output, recipe=recipe, force=force, origin=origin)
    return PruneResult(
        **_spending(plan, problem, found),
        allocation=allocation,
        skipped=dict(plan.skipped),
        perplexity=_both(reference.quality, quality),
        kl=quality.kl,
        bytes=bytes_,
        seconds=clock.seconds,
        peak_memory=peak(),
        history=[asdict(step) for step in found.history],
        sensitivities=bench.traces,
        recipe=recipe,
        model=None if settings.stream else opened.model,
        tokenizer=opened.loaded.tokenizer,
        search_fitness=searched,
    )


def search(
    model: Any,
    *,
    sparsity: float | None = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> SearchResult:
    """Find an allocation without pruning the model; the other arguments and the errors are those of ``prune``.

    ``prune`` with the same options and this ``allocation`` returns the same model as ``prune`` with a search. The test
    tokens are set aside as in ``prune``.

    Args:
        output: the directory for ``allocation.json`` and ``recipe.yaml``. It is checked before any work. An existing
            file is replaced if msp wrote it and it was not changed since.
    """
    with working_folder(output):
        if output is not None:
            check_results(output, ALLOCATION_FILES)
        (result,) = search_all(model, [{"sparsity": sparsity, **options}], tokenizer=tokenizer, progress=progress)
        if output is not None:
            write_allocation(Path(output), result.allocation, result.recipe)
    return result


def search_all(
    model: Any,
    requests: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    measured: bool = False,
) -> Iterator[SearchResult]:
    """Yield the result of a search for each of ``requests``; they differ only in the budget and ``work_dir``.

    The searches share the model and its statistics. A search that starts from seeds gets one more seed: the result of
    the search before it, with its densities scaled to the new budget.

    Args:
        measured: measure the ``loss`` of every result, even if the allocator does not measure it.

    Raises:
        UsageError, MspError: as for ``prune``; also if a request gives an allocation.
    """
    settings = [_options(request.get("sparsity"), {**request}) for request in requests]
    if any(each.allocation is not None for each in settings):
        raise UsageError("a search finds an allocation; one that is given leaves nothing to search for")
    settings = [fitting(model, each, may_stream=True) for each in settings]
    with ExitStack() as stack:
        for each in settings:
            stack.enter_context(_places(each))
        yield from _search_all(model, settings, tokenizer, progress or NoProgress(), measured)


def _search_all(
    model: Any, settings: Sequence[PruneOptions], tokenizer: Any, listener: Progress, measured: bool
) -> Iterator[SearchResult]:
    clock, first = _Stopwatch(), settings[0]
    with clock("load"):
        opened = open_model(model, first, tokenizer, listener, may_stream=True)
        plans = [opened.plan(each, listener) for each in settings]
        tokens = opened.tokens(first, first.seed)
    bench = opened.bench(plans[0], tokens, first, listener)
    pruner = get_pruner(first.pruner)
    shared = _problem(bench, pruner, first, first.seed)
    problems = [
        replace(shared, budget=plan.budget, search=each.search) for each, plan in zip(settings, plans, strict=True)
    ]
    _check_resume(bench, problems, pruner, first)
    relative: list[float] | None = None
    for each, plan, problem in zip(settings, plans, problems, strict=True):
        if relative is not None:
            problem = replace(problem, hints=(problem.from_densities(relative).levels,))
        with clock("allocate"), opened.structure.changes.steady(opened.model):
            found = _allocate(problem, each)
            loss = _loss(problem, found) if measured or found.history else None
        relative = [density / problem.density for density in problem.densities(found.levels)]
        allocation = plan.allocation(found.levels)
        yield SearchResult(
            **_spending(plan, problem, found),
            allocation=allocation,
            skipped=dict(plan.skipped),
            bytes=opened.bytes_of(allocation),
            loss=loss,
            seconds=dict(clock.seconds),
            peak_memory=peak(),
            history=[asdict(step) for step in found.history],
            sensitivities=bench.traces,
            recipe=_recipe(each, opened, bench, plan, found),
        )


def _loss(problem: Problem, found: Allocated) -> float:
    """The loss of the found levels on all fitness tokens."""
    if found.history:
        return found.history[-1].best
    with problem.evidence.fitness((1.0,)) as fitness:
        return fitness([key_of(found.levels)], 0)[0]


def _problem(bench: Workbench, pruner: Pruner, settings: PruneOptions, seed: int) -> Problem:
    return bench.problem(
        pruner, seed=seed, fitness=settings.measure, search=settings.search, database=settings.database(pruner)
    )


def _check_resume(bench: Workbench, problems: Sequence[Problem], pruner: Pruner, settings: PruneOptions) -> None:
    """Raise an error before any work if another search left the files to resume; warn if there are no files."""
    checkpoints = [problem.search.checkpoint for problem in problems]
    if not settings.resume:
        return
    left = False
    for problem, checkpoint in zip(problems, checkpoints, strict=True):
        assert checkpoint is not None, "PruneOptions refuses that"
        if checkpoint.exists():
            read_checkpoint(checkpoint, problem.identity, partial=True)
            left = True
        if settings.database(pruner):
            database = bench.database(pruner, checkpoint.with_name(DATABASE))
            left |= database.check()
    if not left:
        warnings.warn(f"nothing to resume in {settings.work_dir}: the search starts anew", stacklevel=3)


def _pruned(
    bench: Workbench,
    allocation: Allocation,
    pruner: Pruner,
    test: DenseReference,
    fitness: Reference | None,
    clock: _Stopwatch,
) -> tuple[dict[str, PackedWeight | CodedWeight], Sums, Sums | None]:
    """``StreamedWorkbench.prune_to`` for a model in memory; afterwards the model is dense again."""
    with ExitStack() as stack:
        with clock("prune"):
            model = stack.enter_context(bench.pruned(allocation, pruner))
        with clock("evaluate"):
            sums, on_fitness = test.total(model, progress=bench.progress), None
            _check_quality(test.quality_of(sums), model, test)
            if fitness is not None:
                on_fitness = fitness.total(model, progress=bench.progress, label="Evaluating on fitness tokens")
        sparse = {linear.name: model.get_submodule(linear.name) for linear in bench.linears}
        packed = {name: module.packed for name, module in sparse.items() if isinstance(module, SparseLinear)}
    give_back()  # saving takes memory too
    return packed, sums, on_fitness


def _check_quality(quality: Quality, model: Any, test: Reference, *, streamed: bool = False) -> None:
    """Raise ``MspError`` if a figure of the pruned model is not finite; such a model is useless and is not saved."""
    figures = {"perplexity of the pruned model": quality.perplexity, "KL": quality.kl}
    check_figures(figures, model, test.tokens(0), streamed=streamed)


def _search_fitness(found: Allocated, total: Sums | None, settings: PruneOptions) -> dict[str, float] | None:
    """The loss of the best candidate in the search, and the loss of the model that was pruned to its levels."""
    if total is None:
        return None
    loss = total.divergence if settings.measure == "kl" else total.loss
    return {"candidate": found.history[-1].best, "pruned": loss / total.predicted}


def _allocate(problem: Problem, settings: PruneOptions) -> Allocated:
    if settings.allocation is not None:
        return Allocated(np.zeros(len(problem.units), dtype=np.int64))
    return allocate(get_allocator(settings.allocator), problem)


def _spending(plan: Plan, problem: Problem, found: Allocated) -> dict[str, Any]:
    kept = plan.skipped_weights + problem.kept(found.levels)
    return {
        "density": kept / plan.total_weights,
        "kept": kept,
        "budget": plan.limit,
        "objective": plan.objective,
        "spent": plan.fixed_cost + problem.cost(found.levels),
        "dense_cost": plan.dense_cost,
    }


def compare(
    model: Any,
    *,
    sparsity: float | None = None,
    allocators: Sequence[str],
    pruners: Sequence[str] = ("wanda",),
    seeds: Sequence[int] = (0, 1, 2),
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> CompareResult:
    """Measure every allocator with every pruner on the same model, budget and test tokens.

    The seed decides the calibration tokens, the fitness tokens and the search; the test tokens do not depend on it.
    The other arguments and the errors are those of ``prune``. Afterwards the model is dense again.
    """
    settings = _options(sparsity, options)
    chosen = [(name, get_allocator(name)) for name in allocators]
    methods = [(name, get_pruner(name)) for name in pruners]
    if not chosen or not methods or not seeds:
        raise UsageError("compare needs at least one allocator, one pruner and one seed")
    settings = fitting(model, settings, may_stream=False)
    with _places(settings):
        return _compare(model, settings, chosen, methods, seeds, tokenizer, progress or NoProgress())


def _compare(
    model: Any,
    settings: PruneOptions,
    chosen: Sequence[tuple[str, Allocator]],
    methods: Sequence[tuple[str, Pruner]],
    seeds: Sequence[int],
    tokenizer: Any,
    listener: Progress,
) -> CompareResult:
    opened = open_model(model, settings, tokenizer, listener)
    plan = opened.plan(settings, listener)
    rows: list[CompareRow] = []
    reference: DenseReference | None = None
    with (
        opened.structure.changes.steady(opened.model),
        listener.stage("Rows", len(chosen) * len(methods) * len(seeds)) as advance,
    ):
        for seed in seeds:
            tokens = opened.tokens(settings, seed)
            reference = reference or opened.test_reference(tokens, listener)
            bench = opened.bench(plan, tokens, settings, listener)
            for pruner_name, pruner in methods:
                problem = _problem(bench, pruner, settings, seed)
                for name, allocator in chosen:
                    start = time.perf_counter()
                    found = allocate(allocator, problem)
                    with bench.pruned(plan.allocation(found.levels), pruner) as pruned:
                        seconds = time.perf_counter() - start
                        quality = reference.measure(pruned, progress=listener)
                    rows.append(
                        CompareRow(
                            name,
                            pruner_name,
                            seed,
                            density=(plan.skipped_weights + problem.kept(found.levels)) / plan.total_weights,
                            kl=quality.kl,
                            perplexity=quality.perplexity,
                            evaluations=found.evaluations,
                            seconds=seconds,
                            tokens=found.tokens,
                            history=[asdict(step) for step in found.history],
                        )
                    )
                    advance(len(rows), allocator=name, pruner=pruner_name, seed=seed, kl=quality.kl)
    assert reference is not None
    described: dict[str, Any] = {"model": opened.loaded.source, **settings.budget}
    described |= {"unit": settings.unit, "fitness": settings.fitness_name, **tokens.sources, "seed": list(seeds)}
    return CompareResult([*rows, *mean_rows(rows)], reference.quality.perplexity, described)


def sensitivity(
    model: Any, *, tokenizer: Any = None, progress: Progress | None = None, **options: Any
) -> SensitivityResult:
    """The Fisher trace of every linear, on the calibration tokens; arguments and errors are those of ``prune``."""
    settings = _options(0.5, {"fitness_tokens": 0, "test_tokens": 0, **options})
    listener = progress or NoProgress()
    opened = open_model(model, settings, tokenizer, listener)
    tokens = opened.tokens(settings, settings.seed)
    linears = opened.structure.linears
    with (
        opened.structure.changes.steady(opened.model),
        listener.stage("Fisher traces", len(tokens.calibration)) as advance,
    ):
        traces = fisher_traces(opened.model, linears, tokens.calibration, progress=advance)
    blocks = [sum(traces[linear.name] for linear in block.linears) for block in opened.structure.blocks]
    return SensitivityResult(
        traces,
        blocks,
        {linear.name: linear.shape for linear in linears},
        {linear.name: linear.kind for linear in linears},
        {"model": opened.loaded.source, **tokens.sources},
    )


def evaluate(
    model: str | Path,
    *,
    evaluate: str = DEFAULT_EVALUATION,
    reference: str | Path | None = None,
    window: int | None = None,
    test_tokens: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    dequantise: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The perplexity of a dense or packed model on a text, and its KL to a dense ``reference`` if one is given.

    Both models compute in the same dtype, because another dtype would change the figures too. On a CPU ``auto`` is
    float32, also for a packed model. On other devices it is the stored dtype of the reference or, without a reference,
    of the model. One model at a time is in memory.

    Returns:
        ``model``, ``perplexity``, ``evaluate``, ``window``, ``tokens``, ``dtype``; with a reference also ``kl``, in
        nats a token, and ``reference``.

    Raises:
        UsageError: the window is longer than the model's context, or the dtype or the device is unknown.
        MspError: the model is absent, the text cannot be used, or the reference has another vocabulary.
    """
    TokenSource.parse(evaluate).check()
    listener = progress or NoProgress()
    place = find_device(device)
    check_dtype(dtype)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    skeletons = [make_skeleton(read_causal_config(each, **trust), **trust) for each in (model, reference) if each]
    vocabulary, length = vocabulary_size(skeletons[0]), window_of(skeletons[0], window)
    if vocabulary_size(skeletons[-1]) != vocabulary:
        raise MspError(f"{reference} has another vocabulary than {model}: their predictions do not compare")
    tokenizer = read_tokenizer(str(model), local_folder(str(model)), **trust)
    windows = read_windows(evaluate, tokenizer, vocabulary, window=length, tokens=test_tokens)
    size = batch_size(place, length)
    dense = None
    if reference is not None:
        loaded = load_model(reference, dtype=dtype, device=place, dequantise=dequantise, narrow=True, **trust)
        dtype = str(computed_dtype(loaded.model)).removeprefix("torch.")
        with run_text(loaded.model, ()).changes.steady(loaded.model):
            dense = DenseReference(loaded.model, windows, batch_size=size, progress=listener)
        del loaded
        gc.collect()  # modules refer to each other, so reference counts do not free them
        give_back()
    measured = load_model(model, dtype=dtype, device=place, dequantise=dequantise, narrow=True, **trust).model
    with run_text(measured, ()).changes.steady(measured):
        if dense is None:
            quality = perplexity(measured, windows, batch_size=size, progress=listener)
        else:
            quality = dense.measure(measured, progress=listener)
            check_figures({"perplexity": quality.perplexity, "KL": quality.kl}, measured, dense.tokens(0))
    figures: dict[str, Any] = {"model": str(model), "perplexity": quality.perplexity}
    if reference is not None:
        figures |= {"kl": quality.kl, "reference": str(reference)}
    computed = str(computed_dtype(measured)).removeprefix("torch.")
    return figures | {"evaluate": evaluate, "window": length, "tokens": windows.numel(), "dtype": computed}


def _options(sparsity: float | None, options: dict[str, Any]) -> PruneOptions:
    try:
        settings = PruneOptions(**{**options, "sparsity": sparsity})
    except TypeError as error:
        raise UsageError(str(error).replace("PruneOptions.__init__() ", "")) from error
    settings.check()
    return settings


def _both(dense: Quality, pruned: Quality) -> dict[str, float]:
    return {"dense": dense.perplexity, "pruned": pruned.perplexity}


def _recipe(options: PruneOptions, opened: Opened, bench: Workbench, plan: Plan, found: Allocated) -> dict[str, Any]:
    names = ["pruner", "seed"] if options.allocation else ["allocator", "pruner", "unit", "seed"]
    versions = {"msp": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]}
    return {
        "model": name_alone(opened.loaded.source),
        **options.budget,
        **{name: getattr(options, name) for name in names},
        **({} if options.allocation else {"fitness": options.fitness_name}),
        "calibration": dict(bench.tokens.sources),
        "budget": plan.limit,
        "skipped": dict(plan.skipped),
        "search": {
            "candidates": found.evaluations,
            "forwarded": found.tokens,
            "database_bytes": bench.database_bytes,
            **asdict(found.options),
        }
        if found.options
        else None,
        "versions": versions,
    }
