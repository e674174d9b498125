"""Find an allocation and prune nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp.allocators import Allocated, Problem
from msp.base.host_memory import peak
from msp.base.outputs import check_results, working_folder
from msp.base.progress import NoProgress, Progress
from msp.engine.fitness import key_of
from msp.errors import UsageError
from msp.plan.recipe import ALLOCATION_FILES, write_allocation
from msp.session.arguments import SearchArguments
from msp.session.declarations import documented
from msp.session.opened import open_model
from msp.session.options import Options
from msp.session.preview import fitting
from msp.session.results import SearchResult
from msp.verbs._runs import Stopwatch, check_resume, places, recipe_of, solved, spending

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(SearchArguments)
def search(
    model: Any,
    *,
    output: str | Path | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **arguments: Unpack[SearchArguments],
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
        (result,) = search_all(model, [arguments], tokenizer=tokenizer, progress=progress)
        if output is not None:
            write_allocation(Path(output), result.allocation, result.recipe)
    return result


def search_all(
    model: Any,
    requests: Sequence[SearchArguments],
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
    options = [Options.parse(**request) for request in requests]
    if any(each.given for each in options):
        raise UsageError("a search finds an allocation; one that is given leaves nothing to search for")
    options = [fitting(model, each, may_stream=True) for each in options]
    listener, clock, first = progress or NoProgress(), Stopwatch(), options[0]
    with ExitStack() as stack:
        for each in options:
            stack.enter_context(places(each))
        with clock("load"):
            opened = open_model(model, first, tokenizer, listener, may_stream=True)
            plans = [opened.plan(each, listener) for each in options]
            tokens = opened.tokens(first, first.seed)
        bench = opened.bench(plans[0], tokens, first, listener)
        shared = bench.problem(first, first.pruner)
        problems = [
            replace(shared, budget=plan.budget, search=each.search) for each, plan in zip(options, plans, strict=True)
        ]
        check_resume(bench, problems, first)
        relative: list[float] | None = None
        for each, plan, problem in zip(options, plans, problems, strict=True):
            if relative is not None:
                problem = replace(problem, hints=(problem.from_densities(relative).levels,))
            with clock("allocate"), opened.structure.changes.steady(opened.model):
                found = solved(problem, each)
                loss = _loss(problem, found) if measured or found.history else None
            relative = [density / problem.density for density in problem.densities(found.levels)]
            allocation = plan.allocation(found.levels)
            yield SearchResult(
                **spending(plan, problem, found),
                allocation=allocation,
                skipped=dict(plan.skipped),
                bytes=opened.bytes_of(allocation),
                loss=loss,
                seconds=dict(clock.seconds),
                peak_memory=peak(),
                history=[asdict(step) for step in found.history],
                sensitivities=bench.traces,
                recipe=recipe_of(each, opened, bench, plan, found),
            )


def _loss(problem: Problem, found: Allocated) -> float:
    """The loss of the found levels on all fitness tokens."""
    if found.history:
        return found.history[-1].best
    with problem.evidence.fitness((1.0,)) as fitness:
        return fitness([key_of(found.levels)], 0)[0]
