"""The verb ``recover``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from msp.cli.options import AsJson, Debug, given, takes
from msp.cli.running import calm_libraries, running
from msp.cli.verbs import app
from msp.session.declarations import METHOD, RUN
from msp.session.recover_arguments import RecoverArguments


@app.command()
@takes(RecoverArguments)
def recover(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A packed model: a directory or a hub id.")],
    teacher: Annotated[
        str,
        typer.Option(
            metavar="DENSE",
            help="The dense model that MODEL was pruned from: a directory or a hub id.",
            rich_help_panel=METHOD,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Directory to write the packed model to.", rich_help_panel=RUN
        ),
    ],
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the model at OUT, if msp wrote all its files.", rich_help_panel=RUN),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a pruned model until it predicts like the dense one again.

    The dense model is the teacher. Patterns (N:M keeps N of every M weights), masks and bytes stay as they are; only
    kept values, norms and biases change. A part of the text is held out, and its loss decides which values are kept.
    Without a gain the model stays as it was. Needs the extra recover (accelerate).

    Example: msp recover ./my-model-75 --teacher ./my-model --calibration notes.txt -o ./my-model-75-recovered
    """
    interrupted = f"interrupted, {output} is not written; run the same command with --resume to go on"
    with running(as_json, debug, on_interrupt=interrupted) as session:
        import msp
        from msp.base.outputs import reserved, working_folder
        from msp.show.report import recover_report

        calm_libraries()
        work_dir = options["work_dir"] or training_folder(output)
        # both stay reserved until the checkpoints are removed: another run may then begin
        with reserved(output, force, model=model, work_dir=work_dir), working_folder(work_dir):
            result = msp.recover(
                model,
                teacher=teacher,
                output=output,
                force=force,
                progress=session.progress,
                **given({**options, "work_dir": work_dir}),
            )
            if options["work_dir"] is None:
                shutil.rmtree(work_dir, ignore_errors=True)
        session.result(result.to_json(), recover_report(result, output))


def training_folder(output: Path) -> Path:
    """The hidden folder next to ``output`` for the checkpoints of the training."""
    return output.absolute().with_name(f".{output.absolute().name}.recover")
