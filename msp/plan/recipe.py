"""Patterns by the name of a linear, on disk: ``allocation.json`` and YAML recipes.

A recipe has the form of llm-compressor's. It holds stages, stages hold modifiers, and the targets of a modifier are
names or, after ``re:``, regular expressions. The modifier is this project's own, because a modifier of llm-compressor
has one pattern for all its targets, and its N counts the removed weights::

    pruning_stage:
      pruning_modifiers:
        NMPruningModifier:
          patterns:             # N of every M kept; of several targets that match, the first counts
            re:layers.0.*: "4:8"
            model.layers.1.mlp.up_proj: "2:8"
            re:layers.11.*: dense
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from msp.base.outputs import write_results
from msp.base.reading import read_yaml, shown
from msp.errors import MspError, UsageError
from msp.formats.patterns import Allocation
from msp.formats.storage import Storage
from msp.plan.plans import PatternRules, Rule, parse_pinned

MODIFIER = "NMPruningModifier"
ALLOCATION_FILES = ("allocation.json", "recipe.yaml")


def read_rules(path: str | Path) -> PatternRules:
    """The rules of an ``allocation.json`` or of a YAML recipe; linears without a rule stay dense.

    Raises:
        MspError: the file is unreadable, or is neither of the two; the message names the file and the fault.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        exact = {name: Storage(pattern) for name, pattern in Allocation.load(path).items()}
        return PatternRules((), (), exact)
    # Every scalar is read as text, because YAML 1.1 reads an unquoted 4:8 as the number 248, in base 60.
    content = read_yaml(path, plain=True)
    found = list(_modifiers(content))
    if not found:
        raise MspError(f"{path} is no recipe: it has no {MODIFIER} with patterns")
    keep: list[Rule] = []
    for patterns in found:
        for target, text in patterns.items():
            try:
                if not isinstance(text, str):
                    raise UsageError(f"{shown(text)} is not a pattern; N:M is one, like 2:8")
                regex = target.removeprefix("re:") if target.startswith("re:") else re.escape(target)
                keep.append((re.compile(regex), parse_pinned(text)))
            except (UsageError, re.error, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise MspError(f"{path}: {shown(target)}: {error}") from error
    return PatternRules((), tuple(keep))


def _modifiers(content: Any) -> Iterator[Mapping[str, Any]]:
    """The ``patterns`` of every ``NMPruningModifier``, for any names of stages and groups."""
    for stage in content.values() if isinstance(content, dict) else ():
        for group in stage.values() if isinstance(stage, dict) else ():
            modifier = group.get(MODIFIER) if isinstance(group, dict) else None
            if isinstance(modifier, dict) and isinstance(modifier.get("patterns"), dict):
                yield modifier["patterns"]


def write_allocation(folder: Path, allocation: Allocation, made_by: Mapping[str, Any]) -> list[Path]:
    """Write ``allocation.json`` and ``recipe.yaml`` to ``folder``; an existing file is replaced in one step.

    ``made_by`` is stored in the recipe as plain data, for readers only.

    Raises:
        MspError: msp did not write an existing file, a user edited it, or a file cannot be written.
    """
    recipe = {
        "pruning_stage": {"pruning_modifiers": {MODIFIER: {"patterns": allocation.to_strings()}}},
        "made_by": made_by,
    }
    text = "# N:M keeps N of every M consecutive weights of a row.\n" + yaml.safe_dump(recipe, sort_keys=False)
    return write_results(folder, dict(zip(ALLOCATION_FILES, (allocation.to_json(), text), strict=True)))
