"""Prune a dense model to a packed one, or tell what that would take."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp.allocators import Allocated
from msp.base.finite import check_figures
from msp.base.host_memory import peak
from msp.base.outputs import check_room, reserved
from msp.base.progress import NoProgress, Progress
from msp.errors import UsageError
from msp.evidence.evaluate import Sums
from msp.session.arguments import PruneArguments
from msp.session.declarations import documented
from msp.session.opened import open_model
from msp.session.options import Options
from msp.session.preview import Preview, fitting, preview
from msp.session.results import PruneResult
from msp.verbs._runs import Stopwatch, check_resume, places, recipe_of, solved, spending

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(PruneArguments)
def prune(
    model: Any,
    *,
    output: str | Path | None = None,
    force: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **arguments: Unpack[PruneArguments],
) -> PruneResult:
    """Prune a causal LM to N:M sparsity with a level per unit, and pack it.

    Args:
        model: a directory, a hub id, or a model object (which is packed in place).
        output: the directory to save the packed model to. No other run can write to it, or to ``work_dir``, during the
            run.
        force: replace the directory ``output`` if it exists and msp wrote all its files.
        tokenizer: the tokenizer of a model object.
        progress: the progress display.
        arguments: the budget (one of ``sparsity``, ``budget_bytes``, ``budget_decode`` and ``allocation``) and the
            options that are listed below.

    Raises:
        UsageError: the request is wrong. The error comes before the model is loaded if the request alone shows it.
        MspError: a model, a text or a folder cannot be used.
    """
    options, listener, clock = Options.parse(**arguments), progress or NoProgress(), Stopwatch()
    if output is None and options.stream:
        raise UsageError("a streamed model is packed on disk, block by block: stream needs an output")
    options = fitting(model, options, may_stream=output is not None)
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(reserved(output, force, model=model, work_dir=options.work_dir))
        stack.enter_context(places(options))
        with clock("load"):
            opened = open_model(model, options, tokenizer, listener, may_stream=True)
            plan = opened.plan(options, listener)
            if output is not None:
                check_room(output, opened.expected_bytes(plan), "the packed model")
            tokens = opened.tokens(options, options.seed)
        bench = opened.bench(plan, tokens, options, listener)
        problem = bench.problem(options, options.pruner)
        if not options.given:
            check_resume(bench, [problem], options)
        stack.enter_context(opened.structure.changes.steady(opened.model))
        with clock("calibrate"):
            _ = bench.unreached  # warns before any long work
        with clock("evaluate"):
            test = bench.predictions(tokens.test, "Dense test predictions")
        with clock("allocate"):
            found = solved(problem, options)
            allocation = plan.allocation(found.levels)
        problem.evidence.release()
        references = [test, bench.reference(options.fitness)] if found.history else [test]
        size = opened.bytes_of(allocation)["packed"]
        with bench.writer(opened.loaded, output, force=force, size=size) as writer:
            measured = writer.prune(allocation, options.pruner, references, clock)
            quality = test.quality_of(measured[0])
            figures = {"perplexity of the pruned model": quality.perplexity, "KL": quality.kl}
            check_figures(figures, opened.model, test.tokens(0), streamed=options.stream)
            perplexities = {"dense": test.quality.perplexity, "pruned": quality.perplexity}
            searched = _search_fitness(found, measured, options)
            writer.pack()
            bytes_ = {"dense": opened.loaded.stored.dense_bytes, "packed": opened.loaded.stored.nbytes(opened.model)}
            recipe = recipe_of(options, opened, bench, plan, found)
            recipe |= {"perplexity": perplexities, "kl": quality.kl, "bytes": bytes_, "search_fitness": searched}
            writer.save(recipe, clock)
    return PruneResult(
        **spending(plan, problem, found),
        allocation=allocation,
        skipped=dict(plan.skipped),
        perplexity=perplexities,
        kl=quality.kl,
        bytes=bytes_,
        seconds=clock.seconds,
        peak_memory=peak(),
        history=[asdict(step) for step in found.history],
        sensitivities=bench.traces,
        recipe=recipe,
        model=None if options.stream else opened.model,
        tokenizer=opened.loaded.tokenizer,
        search_fitness=searched,
    )


@documented(PruneArguments)
def dry_run(model: str | Path, *, progress: Progress | None = None, **arguments: Unpack[PruneArguments]) -> Preview:
    """The plan of ``prune`` with the same options, and an estimate of its memory; no weights and no text are read.

    Raises:
        UsageError, MspError: the errors of ``prune`` that need neither the weights nor the text.
    """
    return preview(model, Options.parse(**arguments), progress)


def _search_fitness(found: Allocated, measured: list[Sums], options: Options) -> dict[str, float] | None:
    """The loss of the best candidate in the search, and the loss of the model that was pruned to its levels."""
    if len(measured) < 2:
        return None
    total = measured[1]
    loss = total.divergence if options.fitness == "kl" else total.loss
    return {"candidate": found.history[-1].best, "pruned": loss / total.predicted}
