"""Reads the constants of a search that a user gives, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from msp.base.reading import parse_yaml, read_yaml
from msp.engine.evolution import UNLIMITED, EvolutionOptions
from msp.errors import UsageError

# Names of constants in older recipes.
FORMER = {"sensitivities": "patience"}
# The limit on the tokens has an option of its own.
DEFAULTS = {field.name: field.default for field in fields(EvolutionOptions) if field.name != "tokens"}


def read_constants(given: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of ``EvolutionOptions`` that a user changes.

    Args:
        given: the fields; or a text like ``"crossover_rate: 0, survivors: [0.5, 0.5]"``; or the ``recipe.yaml`` of
            another search, to use the same constants.

    Raises:
        UsageError: a name is unknown, a value has the wrong type, or constants exclude each other.
    """
    found = given if isinstance(given, Mapping) else _read(given) if given is not None else {}
    constants = {name: _checked(name, value) for name, value in found.items()}
    EvolutionOptions(**constants)
    return constants


def _read(given: str | Path) -> dict[str, Any]:
    recipe = Path(given).suffix.lower() in (".yaml", ".yml")
    try:
        found = read_yaml(given) if recipe else parse_yaml(f"{{{given}}}")
        if recipe:
            recorded = {FORMER.get(name, name): value for name, value in found["made_by"]["search"].items()}
            found = {name: value for name, value in recorded.items() if name in DEFAULTS}
            generations = found.get("generations")
            if isinstance(generations, int) and generations >= UNLIMITED:  # a limit on the tokens ended that search
                del found["generations"]
        found = dict(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"search options: {given} is no recipe of a search, nor NAME: VALUE, ...: {error}") from error
    return found


def _checked(name: str, value: Any) -> Any:
    if name not in DEFAULTS:
        raise UsageError(f"unknown search option {name!r}; known: {', '.join(DEFAULTS)}")
    default = DEFAULTS[name]
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and all(type(entry) in (int, float) for entry in value):
            return tuple(value)
    elif type(value) is type(default) or (type(default) is float and type(value) is int):
        return value
    raise UsageError(f"search option {name}: {value!r} is not like {default!r}")
