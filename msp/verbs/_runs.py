"""The steps that several verbs share."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from msp import __version__
from msp.allocators import Allocated, Problem, allocate
from msp.base.files import name_alone
from msp.base.outputs import check_temporary, working_folder
from msp.compressions.nm_database import DATABASE
from msp.engine.state import read_checkpoint
from msp.plan.plans import Plan
from msp.session.opened import Opened
from msp.session.options import Options
from msp.session.workbench import Workbench


class Stopwatch:
    """The seconds of each stage; a stage that runs twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@contextmanager
def places(options: Options) -> Iterator[None]:
    """The folders that a search may write to, checked and locked."""
    if options.stream or (options.work_dir is None and options.database):
        check_temporary()
    with working_folder(options.work_dir):
        yield


def solved(problem: Problem, options: Options) -> Allocated:
    """The levels of every unit, found by the allocator or read from the allocation that was given."""
    if options.given:
        return Allocated(np.zeros(len(problem.units), dtype=np.int64))
    return allocate(options.allocator, problem)


def check_resume(bench: Workbench, problems: Sequence[Problem], options: Options) -> None:
    """Raise an error before any work if another search left the files to resume; warn if there are no files."""
    if not options.resume:
        return
    left = False
    for problem in problems:
        checkpoint = problem.search.checkpoint
        assert checkpoint is not None, "Options.parse refuses that"
        if checkpoint.exists():
            read_checkpoint(checkpoint, problem.identity, partial=True)
            left = True
        if options.database:
            left |= bench.database(options.pruner, checkpoint.with_name(DATABASE)).check()
    if not left:
        warnings.warn(f"nothing to resume in {options.work_dir}: the search starts anew", stacklevel=3)


def spending(plan: Plan, problem: Problem, found: Allocated) -> dict[str, Any]:
    """The fields of a result that tell what the levels cost."""
    kept = plan.skipped_weights + problem.kept(found.levels)
    return {
        "density": kept / plan.total_weights,
        "kept": kept,
        "budget": plan.limit,
        "objective": plan.objective,
        "spent": plan.fixed_cost + problem.cost(found.levels),
        "dense_cost": plan.dense_cost,
    }


def recipe_of(options: Options, opened: Opened, bench: Workbench, plan: Plan, found: Allocated) -> dict[str, Any]:
    """Everything that is needed to make the result again, as plain data."""
    searched: Mapping[str, Any] | None = None
    if found.options:
        searched = {
            "candidates": found.evaluations,
            "forwarded": found.tokens,
            "database_bytes": bench.database_bytes,
            **asdict(found.options),
        }
    return {
        "model": name_alone(opened.loaded.source),
        **options.budget,
        **({} if options.given else {"allocator": options.allocator.name}),
        "pruner": options.pruner.name,
        **({} if options.given else {"unit": options.unit}),
        "seed": options.seed,
        **({} if options.given else {"fitness": options.fitness_name}),
        "calibration": dict(bench.tokens.sources),
        "budget": plan.limit,
        "skipped": dict(plan.skipped),
        "search": searched,
        "versions": {"msp": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]},
    }
