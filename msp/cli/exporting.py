"""The verb ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from msp.cli.options import AsJson, Debug, takes
from msp.cli.running import calm_libraries, running
from msp.cli.verbs import app
from msp.errors import UsageError
from msp.session.arguments import Trusting
from msp.session.declarations import RUN


@app.command()
@takes(Trusting)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A packed model: a directory.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Directory to write the exported model to.", rich_help_panel=RUN
        ),
    ],
    dense: Annotated[
        bool,
        typer.Option(
            "--dense",
            help="Store the zeros too: plain dense tensors, as in a model that was never packed.",
            rich_help_panel=RUN,
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the model at OUT, if msp wrote all that is in it.", rich_help_panel=RUN),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Write a packed model in a form that other programs load.

    The dense form computes the same as the packed one and takes the bytes of the dense model. It needs no msp:
    converters, servers and trainers read it like any other model.

    Example: msp export ./my-model-75 --dense -o ./my-model-75-dense
    """
    with running(as_json, debug, on_interrupt=f"interrupted, {output} is not written") as session:
        if not dense:
            raise UsageError("export needs the form to write: --dense is the one there is")
        from msp.base.readable import size
        from msp.base.safetensors_files import header_bytes, tensor_files
        from msp.packed.dense import export_dense
        from msp.packed.info import read_info

        calm_libraries()
        with session.progress.stage("Exporting"):
            target = export_dense(model, output, force=force, **options)
        info, files = read_info(model), tensor_files(target)
        written = sum(file.stat().st_size - header_bytes(file) for file in files)
        packed = info.packed_bytes + info.other_bytes
        data = {
            "model": model,
            "output": str(output),
            "form": "dense",
            "linears": sum(not linear.storage.is_dense for linear in info.linears),
            "bytes": {"packed": packed, "dense": written},
            "files": sorted(file.name for file in target.iterdir()),
        }
        session.result(data, Text(f"{output}: {size(written)} of dense tensors, {size(packed)} packed"))
