"""The verbs ``search`` and ``measure``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from msp.cli.options import AsJson, Debug, Model, given, takes
from msp.cli.running import calm_libraries, running
from msp.cli.verbs import app, search_folder, with_budget
from msp.errors import UsageError
from msp.session.arguments import MeasureArguments, SearchArguments
from msp.session.declarations import RUN


@app.command()
@takes(SearchArguments)
def search(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Directory to write allocation.json and recipe.yaml to. Existing files are replaced if msp wrote them "
            "and nobody changed them. With several budgets, each has a folder in it, next to pareto.json and "
            "pareto.png.",
            rich_help_panel=RUN,
        ),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Find out how many weights each layer keeps, and prune nothing yet.

    Writes the pattern of every layer (N:M keeps N of every M consecutive weights) as JSON and as a recipe in YAML. You
    can read and change both, and give them to msp prune --allocation. Test tokens are set aside as in msp prune: with
    the same options, both commands together give the model that msp prune alone gives. Several budgets at once share
    all work but the searches.

    Example: msp search ./my-model -o ./found --budget-bytes 300MB --calibration notes.txt
    """
    interrupted = f"interrupted, {output} is not complete; run the same command with --resume to go on"
    with running(as_json, debug, on_interrupt=interrupted) as session:
        import msp
        from msp.base.outputs import working_folder
        from msp.show.report import pareto_report, search_report

        calm_libraries()
        work_dir = options["work_dir"] or search_folder(output)
        chosen = with_budget({**options, "work_dir": work_dir})
        budget, several = _several(chosen)
        with working_folder(work_dir):
            if several is None:
                result = msp.search(model, output=output, progress=session.progress, **chosen)
                session.result(result.to_json(), search_report(result, output))
            else:
                chosen.pop(budget)
                curve = msp.pareto(model, **several, output=output, progress=session.progress, **chosen)
                session.result(curve.to_json(), pareto_report(curve, output))
            if options["work_dir"] is None:
                shutil.rmtree(work_dir, ignore_errors=True)


def _several(options: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The option that names budgets and, if it names several, the argument of ``pareto`` for them."""
    lists = {"sparsity": "sparsities", "budget_bytes": "budgets_bytes", "budget_decode": "budgets_decode"}
    asked = [name for name in lists if name in options]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)}: one of them says how much may stay")
    parts = [part.strip() for part in str(options[asked[0]]).split(",")]
    return asked[0], {lists[asked[0]]: parts} if len(parts) > 1 else None


@app.command()
@takes(MeasureArguments)
def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense model: a directory or a hub id.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="JSON file to write the times to. An existing file is replaced if it is such a table.",
            rich_help_panel=RUN,
        ),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure how long the layers of a model take to decode a token, for --budget-decode.

    Times every shape of the prunable layers, dense and with every pattern N:M (N of every M kept), on this device, with
    torch's number of threads and in the dtype in which the model is stored. It reads the shapes, but no weights.

    Example: msp measure ./my-model -o decode-table.json --patterns 0:8,1:8,2:8,4:8
    """
    with running(as_json, debug) as session:
        import msp
        from msp.show.report import decode_report

        calm_libraries()
        table = msp.measure(model, output=output, progress=session.progress, **given(options))
        session.result(table.to_json(), decode_report(table, output))
