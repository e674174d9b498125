"""How an option is declared, and what is made of the declarations: defaults, checks of names, signatures, docstrings.

``msp.session.arguments`` has the options themselves. Nothing heavy is imported here, because ``msp --help`` needs it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from msp.errors import UsageError

# The headings of the options in the help of the command line.
METHOD, DATA, COST, RUN = "Method", "Text", "Cost", "Output and running"


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        help: what it does; other options are named as on the command line, like ``--sparsity``.
        default: the value if it is not given; None if the option is then off or decided later.
        kind: the type that the command line converts it to.
        heading: the heading in the help of the command line.
        metavar: how the command line shows the value.
        letter: the one-letter name on the command line.
        aside: what the help of the command line says beyond ``help``.
    """

    help: str
    default: Any = None
    kind: type = str
    heading: str = METHOD
    metavar: str | None = None
    letter: str | None = None
    aside: str = ""


def declared(group: type) -> Iterator[tuple[str, Any, Option]]:
    """The name, the type and the declaration of each option of ``group``, in order."""
    for name, hint in get_type_hints(group, include_extras=True).items():
        yield name, hint.__origin__, hint.__metadata__[0]


@functools.cache
def defaults(group: type) -> Mapping[str, Any]:
    """The default of every option of ``group``."""
    return {name: option.default for name, _, option in declared(group)}


def completed(given: Mapping[str, Any], group: type) -> dict[str, Any]:
    """Every option of ``group``: as it was given, or its default if it was not given or is None.

    Raises:
        UsageError: a name is no option of ``group``; the message names the nearest one.
    """
    for name in given:
        if name not in defaults(group):
            near = difflib.get_close_matches(name, defaults(group), 1)
            hint = f": did you mean {near[0]}?" if near else f"; the options are {', '.join(defaults(group))}"
            raise UsageError(f"unknown option {name!r}{hint}")
    return {**defaults(group), **{name: value for name, value in given.items() if value is not None}}


Verb = TypeVar("Verb", bound=Callable[..., Any])


def documented(group: type) -> Callable[[Verb], Verb]:
    """A decorator for a function with ``**options`` of ``group``: its signature and docstring then list them all."""

    def decorate(verb: Verb) -> Verb:
        signature = inspect.signature(verb)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=kind)
            for name, kind, option in declared(group)
            if name not in signature.parameters
        ]
        verb.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        lines = [f"    {name}: {_plain(option)}" for name, _, option in declared(group)]
        verb.__doc__ = "\n".join([inspect.cleandoc(verb.__doc__ or ""), "", "Options:", *lines, ""])
        return verb

    return decorate


def _plain(option: Option) -> str:
    """The help of an option for Python: arguments instead of flags, no markdown."""
    text = re.sub(r"--([a-z-]+)", lambda match: match[1].replace("-", "_"), option.help)
    text = re.sub(r"\*\*msp (\w+)\*\*", r"``\1``", text).replace("**", "")
    return text if option.default in (None, False) else f"{text} Default: {option.default}."
