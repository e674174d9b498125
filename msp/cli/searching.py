"""The verbs ``search`` and ``measure``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from msp.cli.options import (
    METHOD,
    RUN,
    AsJson,
    Debug,
    DecodeTable,
    Dequantise,
    Device,
    Dtype,
    Levels,
    Methods,
    Model,
    OneSearch,
    Searching,
    Streaming,
    TrustRemoteCode,
    takes,
)
from msp.cli.running import calm_libraries, running
from msp.cli.verbs import app, check_sources, given, search_folder, with_budget
from msp.errors import UsageError


class SeveralBudgets:
    """How much may stay, once or several times over."""

    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            "-s",
            metavar="SHARE,SHARE",
            help="Share of the weights to remove, between 0 and 1: 0.75, the default, keeps one in four. Of several, "
            "like 0.5,0.6,0.75, each is searched for.",
            rich_help_panel=METHOD,
        ),
    ] = None
    budget_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES,BYTES",
            help="Instead of --sparsity: what the whole packed model may take, like 300MB or 1.5GB; one or several.",
            rich_help_panel=METHOD,
        ),
    ] = None
    budget_decode: Annotated[
        str | None,
        typer.Option(
            metavar="TIME,TIME",
            help="Instead of --sparsity: how long all prunable layers together may take to decode a token, like 12ms "
            "or 800us, each called once, as predicted from measured times; one or several.",
            rich_help_panel=METHOD,
        ),
    ] = None
    decode_table: DecodeTable = None


@app.command()
@takes(SeveralBudgets, Levels, Methods, Searching, OneSearch, Streaming)
def search(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Directory to write allocation.json and recipe.yaml to. Those that are there are replaced if msp "
            "wrote them and nobody changed them. With several budgets, each has a folder in it, beside pareto.json and "
            "pareto.png.",
            rich_help_panel=RUN,
        ),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Find out how many weights each layer keeps, and prune nothing yet.

    Writes the pattern of every layer (N:M keeps N of every M consecutive weights) as JSON and as a recipe in YAML, to
    be read, changed and given to msp prune --allocation. Test tokens are set aside as there: with the same options,
    both together give the model that msp prune alone gives. Several budgets at once share all but the searches.

    Example: msp search ./my-model -o ./found --budget-bytes 300MB --calibration notes.txt
    """
    interrupted = f"interrupted, {output} is not complete; run the same command with --resume to go on"
    with running(as_json, debug, on_interrupt=interrupted) as session:
        check_sources(options["calibration"], options["evaluate"])
        from msp.base.outputs import working_folder
        from msp.show.report import pareto_report, search_report
        from msp.verbs import pipeline

        calm_libraries()
        work_dir = options["work_dir"] or search_folder(output)
        chosen = with_budget(**{**options, "work_dir": work_dir})
        budget, several = _several(chosen)
        with working_folder(work_dir):
            if several is None:
                result = pipeline.search(model, output=output, progress=session.progress, **chosen)
                session.result(result.to_json(), search_report(result, output))
            else:
                from msp.verbs.pareto_curve import pareto

                chosen.pop(budget)
                curve = pareto(model, **several, output=output, progress=session.progress, **chosen)
                session.result(curve.to_json(), pareto_report(curve, output))
            if options["work_dir"] is None:
                shutil.rmtree(work_dir, ignore_errors=True)


def _several(options: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The option that names budgets, and where it names more than one, the argument of ``pareto`` for them."""
    lists = {"sparsity": "sparsities", "budget_bytes": "budgets_bytes", "budget_decode": "budgets_decode"}
    asked = [name for name in lists if name in options]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)}: one of them says how much may stay")
    parts = [part.strip() for part in str(options[asked[0]]).split(",")]
    return asked[0], {lists[asked[0]]: parts} if len(parts) > 1 else None


@app.command()
@takes(Levels)
def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense model: a directory or a hub id.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="JSON file to write the times to. A file that is there is replaced if it is such a table.",
            rich_help_panel=RUN,
        ),
    ],
    dtype: Dtype = "auto",
    device: Device = "auto",
    dequantise: Dequantise = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure how long the layers of a model take to decode a token, for --budget-decode.

    Every shape of its prunable layers is timed dense and with every pattern N:M (N of every M kept), on this device
    and with as many threads as torch uses, in the dtype the model is stored in. Weights are not read, only the shapes.

    Example: msp measure ./my-model -o decode-table.json --patterns 0:8,1:8,2:8,4:8
    """
    with running(as_json, debug) as session:
        from msp.evidence.measure import measure as measured
        from msp.show.report import decode_report

        calm_libraries()
        table = measured(
            model,
            output=output,
            dtype=dtype,
            device=device,
            dequantise=dequantise,
            trust_remote_code=trust_remote_code,
            progress=session.progress,
            **given(**options),
        )
        session.result(table.to_json(), decode_report(table, output))
