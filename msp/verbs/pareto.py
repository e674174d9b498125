"""Searches to several budgets of one model: what each costs, as a Pareto curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp.base.outputs import check_results, working_folder, write_results
from msp.base.progress import NoProgress, Progress
from msp.errors import UsageError
from msp.plan.budget import parse_sparsity
from msp.plan.plans import parse_bytes, parse_time
from msp.plan.recipe import ALLOCATION_FILES, write_allocation
from msp.session.arguments import Budgets, ParetoArguments, SearchArguments
from msp.session.declarations import documented
from msp.session.results import ParetoResult, SearchResult
from msp.show.pictures import pareto_picture
from msp.show.report import to_json
from msp.verbs.search import search_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

CURVE_FILES = ("pareto.json", "pareto.png")


@documented(ParetoArguments)
def pareto(
    model: Any,
    *,
    sparsities: Sequence[float | str] = (),
    budgets_bytes: Sequence[int | str] = (),
    budgets_decode: Sequence[str] = (),
    output: str | Path | None = None,
    work_dir: str | Path | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **arguments: Unpack[ParetoArguments],
) -> ParetoResult:
    """A search for each of several sparsities, or budgets in bytes or in time; the rest as for ``search``.

    The searches share the model, statistics, ranks and the dense model's predictions; each starts from the result for
    the next looser budget as well.

    Args:
        output: directory for ``BUDGET/allocation.json`` and ``BUDGET/recipe.yaml``, each written when it is found, and
            in the end ``pareto.json`` and ``pareto.png``. Those that are there are replaced as by ``search``.
        work_dir: where the searches keep their checkpoints, each in a folder of its own.
    """
    budgets = _budgets(sparsities, budgets_bytes, budgets_decode)
    place = None if work_dir is None else Path(work_dir)
    requests: list[SearchArguments] = [
        {**arguments, **budget, "work_dir": place and place / name} for name, budget in budgets.items()
    ]
    listener = progress or NoProgress()
    with working_folder(work_dir), working_folder(output):
        if output is not None:
            check_results(output, CURVE_FILES)
            for name in budgets:
                check_results(Path(output) / name, ALLOCATION_FILES)
        curve = _curve(model, requests, list(budgets), output, tokenizer, listener)
        if output is not None:
            texts = (to_json(curve.to_json()) + "\n", pareto_picture(curve))
            write_results(Path(output), dict(zip(CURVE_FILES, texts, strict=True)))
    return curve


def _curve(
    model: Any,
    requests: Sequence[SearchArguments],
    names: Sequence[str],
    output: str | Path | None,
    tokenizer: Any,
    listener: Progress,
) -> ParetoResult:
    results: dict[str, SearchResult] = {}
    with listener.stage("Budgets", len(names)) as advance:
        found = search_all(model, requests, tokenizer=tokenizer, progress=listener, measured=True)
        for name, result in zip(names, found, strict=True):
            results[name] = result
            if output is not None:
                write_allocation(Path(output) / name, result.allocation, result.recipe)
            advance(len(results), budget=name, loss=result.loss)
    first = next(iter(results.values()))
    return ParetoResult(first.recipe["model"], first.recipe["fitness"], results)


def _budgets(
    sparsities: Sequence[float | str], budgets_bytes: Sequence[int | str], budgets_decode: Sequence[str]
) -> Mapping[str, Budgets]:
    """By name, the loosest first, the option of ``search`` that says it."""
    if sum(map(bool, (sparsities, budgets_bytes, budgets_decode))) != 1:
        raise UsageError("a Pareto curve needs sparsities, budgets_bytes or budgets_decode, one of them")
    by_size: list[tuple[float, str, Budgets]]
    if sparsities:
        shares = [float(parse_sparsity(sparsity)) for sparsity in sparsities]
        by_size = [(-share, str(share), {"sparsity": share}) for share in shares]
    elif budgets_bytes:
        by_size = [(parse_bytes(text), _name(text), {"budget_bytes": text}) for text in budgets_bytes]
    else:
        by_size = [(parse_time(text), _name(text), {"budget_decode": text}) for text in budgets_decode]
    if len({size for size, _, _ in by_size}) < len(by_size):
        raise UsageError("a budget is asked for more than once")
    return {name: budget for _, name, budget in sorted(by_size, key=lambda entry: -entry[0])}


def _name(budget: int | str) -> str:
    return str(budget).replace(" ", "")
