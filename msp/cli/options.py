"""Makes the options of a command from the declarations in ``msp.session.arguments``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from msp.session.declarations import RUN, Option, declared

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, a hub id, or a packed model.")]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object on standard output and everything else on standard error.",
        rich_help_panel=RUN,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PNG",
        help="File for the picture. Without it: a file in this folder.",
        rich_help_panel=RUN,
    ),
]


def takes(group: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds the options of ``group`` to a command, which gets them as ``**options``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        kind = inspect.Parameter.KEYWORD_ONLY
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        shared = [
            inspect.Parameter(name, kind, default=option.default, annotation=_typed(name, option))
            for name, _, option in declared(group)
        ]
        required = [parameter for parameter in own if parameter.default is parameter.empty]
        optional = [parameter.replace(kind=kind) for parameter in own if parameter not in required]
        parameters = [*required, *shared, *optional]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(**given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _typed(name: str, option: Option) -> Any:
    flag = f"--{name.replace('_', '-')}"
    names = [flag, *([f"-{option.letter}"] if option.letter else [])]
    text = " ".join(filter(None, (option.help, option.aside)))
    found = typer.Option(*names, help=text, metavar=option.metavar, rich_help_panel=option.heading)
    kind: Any = option.kind if option.default is not None else option.kind | None
    return Annotated[kind, found]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were set; the functions have the same defaults."""
    return {name: value for name, value in options.items() if value is not None}
