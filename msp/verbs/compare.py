"""Measure allocators and pruners against each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from msp.allocators import Allocator, allocate, get_allocator
from msp.base.progress import NoProgress, Progress
from msp.errors import UsageError
from msp.evidence.evaluate import DenseReference
from msp.pruners import Pruner, get_pruner
from msp.session.arguments import CompareArguments
from msp.session.declarations import completed, documented
from msp.session.opened import open_model
from msp.session.options import Options
from msp.session.preview import fitting
from msp.session.results import CompareResult, CompareRow, mean_rows
from msp.verbs._runs import places

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(CompareArguments)
def compare(
    model: Any,
    *,
    allocators: Sequence[str | Allocator],
    pruners: Sequence[str | Pruner] = ("wanda",),
    seeds: Sequence[int] = (0, 1, 2),
    tokenizer: Any = None,
    progress: Progress | None = None,
    **arguments: Unpack[CompareArguments],
) -> CompareResult:
    """Measure every allocator with every pruner on the same model, budget and test tokens.

    The seed decides the calibration tokens, the fitness tokens and the search; the test tokens do not depend on it.
    The other arguments and the errors are those of ``prune``. Afterwards the model is dense again.
    """
    options, listener = Options.parse(**completed(arguments, CompareArguments)), progress or NoProgress()
    chosen, methods = [get_allocator(each) for each in allocators], [get_pruner(each) for each in pruners]
    if not chosen or not methods or not seeds:
        raise UsageError("compare needs at least one allocator, one pruner and one seed")
    options = fitting(model, options, may_stream=False)
    rows: list[CompareRow] = []
    test: DenseReference | None = None
    with places(options):
        opened = open_model(model, options, tokenizer, listener)
        plan = opened.plan(options, listener)
        with (
            opened.structure.changes.steady(opened.model),
            listener.stage("Rows", len(chosen) * len(methods) * len(seeds)) as advance,
        ):
            for seed in seeds:
                tokens = opened.tokens(options, seed)
                test = test or opened.test_reference(tokens, listener)
                bench = opened.bench(plan, tokens, options, listener)
                for pruner in methods:
                    problem = bench.problem(options, pruner, seed=seed)
                    for allocator in chosen:
                        start = time.perf_counter()
                        found = allocate(allocator, problem)
                        with bench.pruned(plan.allocation(found.levels), pruner) as pruned:
                            seconds = time.perf_counter() - start
                            quality = test.measure(pruned, progress=listener)
                        row = CompareRow(
                            allocator.name,
                            pruner.name,
                            seed,
                            density=(plan.skipped_weights + problem.kept(found.levels)) / plan.total_weights,
                            kl=quality.kl,
                            perplexity=quality.perplexity,
                            evaluations=found.evaluations,
                            seconds=seconds,
                            tokens=found.tokens,
                            history=[asdict(step) for step in found.history],
                        )
                        rows.append(row)
                        progressed: dict[str, Any] = {"allocator": row.allocator, "pruner": row.pruner, "seed": seed}
                        advance(len(rows), **progressed, kl=quality.kl)
    assert test is not None
    described: dict[str, Any] = {"model": opened.loaded.source, **options.budget}
    described |= {"unit": options.unit, "fitness": options.fitness_name, **tokens.sources, "seed": list(seeds)}
    return CompareResult([*rows, *mean_rows(rows)], test.quality.perplexity, described)
