"""Measure how sensitive each linear is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msp.base.progress import NoProgress, Progress
from msp.evidence.fisher import fisher_traces
from msp.session.arguments import SensitivityArguments
from msp.session.declarations import completed, documented
from msp.session.opened import open_model
from msp.session.options import Options
from msp.session.results import SensitivityResult

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(SensitivityArguments)
def sensitivity(
    model: Any, *, tokenizer: Any = None, progress: Progress | None = None, **arguments: Unpack[SensitivityArguments]
) -> SensitivityResult:
    """The Fisher trace of every linear, on the calibration tokens; arguments and errors are those of ``prune``."""
    # the budget only fills a place: nothing is pruned
    options = Options.parse(**completed(arguments, SensitivityArguments), sparsity=0.5, fitness_tokens=0, test_tokens=0)
    listener = progress or NoProgress()
    opened = open_model(model, options, tokenizer, listener)
    tokens = opened.tokens(options, options.seed)
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
