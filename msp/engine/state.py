"""The state of a search between two generations, and its file ``search.json``; a reader checks every value."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msp.base.files import write_text
from msp.base.identity import Identity, differences
from msp.base.reading import array, read_json, real, table, text, whole
from msp.engine.fitness import Key
from msp.engine.sensitivities import Effects
from msp.errors import MspError
from msp.plan.budget import Budget, Unit

# The name, in messages, of the levels that the first population comes from.
FIRST = "first individuals"
# Entries of the identity that had another name.
FORMER = {"search option sensitivities": "search option patience"}
KEYS = ("checksum", "identity", "generation", "tokens", "population", "measured", "history", "first_stage", "effects")


@dataclass
class Step:
    """The record of one generation: the candidates measured and tokens forwarded so far, and the losses after it."""

    generation: int
    evaluations: int
    tokens: int
    best: float
    mean: float


@dataclass
class State:
    """The whole state of a search without its constants; a resumed search continues as if it had not stopped.

    Attributes:
        generation: the number of finished generations.
        population: the individuals with their losses, the best first; a loss that is not finite is infinite.
        measured: the loss of every candidate at every stage.
        tokens: the number of tokens forwarded so far.
        history: the record of every generation.
        first_stage: the number of tokens that a candidate takes at the first stage.
        effects: for each measurement of sensitivities, the individual that was moved and the effects of the moves.
    """

    generation: int = 0
    population: list[tuple[float, Key]] = field(default_factory=list)
    measured: dict[tuple[int, Key], float] = field(default_factory=dict)
    tokens: int = 0
    history: list[Step] = field(default_factory=list)
    first_stage: float = 0.0
    effects: list[tuple[Key, Effects]] = field(default_factory=list)


def save_state(path: Path, state: State, identity: Identity) -> None:
    """Write ``path`` in one step, and make its folder if it is absent. An infinite loss is written as ``null``."""
    content = {
        "identity": dict(identity),
        "generation": state.generation,
        "tokens": state.tokens,
        "population": [[_written(loss), key] for loss, key in state.population],
        "measured": [[stage, key, _written(loss)] for (stage, key), loss in state.measured.items()],
        "history": [
            asdict(step) | {"best": _written(step.best), "mean": _written(step.mean)} for step in state.history
        ],
        "first_stage": state.first_stage,
        "effects": [
            [base, [[*move, _written(effect)] for move, effect in found.items()]] for base, found in state.effects
        ],
    }
    content = {"checksum": _checksum(content), **content}
    write_text(path, json.dumps(content, allow_nan=False))


def load_state(path: Path, identity: Identity, units: Sequence[Unit], budget: Budget, stages: int) -> State:
    """Read a state that ``save_state`` wrote.

    Args:
        path: the checkpoint.
        identity: the identity of the search that continues.
        units, budget, stages: the problem of the search; every individual in the file must solve it.

    Raises:
        MspError: the file belongs to another search, or has an entry that no search writes; the message names it.
    """
    content = read_checkpoint(path, identity)
    try:
        return _state(content, units, budget, stages)
    except MspError as error:
        raise MspError(f"{path} is not a search checkpoint: {error}") from error


def read_checkpoint(path: Path, identity: Identity, *, partial: bool = False) -> Mapping[str, Any]:
    """The content of the checkpoint of the search with ``identity``; ``partial`` compares only the given entries.

    Raises:
        MspError: the file is damaged or belongs to another search; the message names the differences.
    """
    try:
        content = table(read_json(path), "the file", ("identity",))
        if not isinstance(content["identity"], dict):
            raise MspError("this msp does not read it: start anew, without resume")
        entries: dict[str, str] = {
            name: text(value, f"identity: {name}") for name, value in content["identity"].items()
        }
        found = {FORMER.get(name, name): value for name, value in entries.items()}
        table(content, "the file", KEYS)
        if content["checksum"] != _checksum({key: value for key, value in content.items() if key != "checksum"}):
            raise MspError("its checksum is another: the file is damaged")
    except MspError as error:
        raise MspError(f"{path} is not a search checkpoint: {error}") from error
    differs = differences(identity, found, partial=partial)
    # The first individuals follow from the other entries, so their difference matters only if the others agree.
    if differs := [difference for difference in differs if FIRST not in difference] or differs:
        raise MspError(f"{path} belongs to another search: {'; '.join(differs)}; start anew without resume")
    return content


def _checksum(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, allow_nan=False).encode(), digest_size=16).hexdigest()


def _state(content: Any, units: Sequence[Unit], budget: Budget, stages: int) -> State:
    population: list[tuple[float, Key]] = []
    for index, entry in enumerate(array(content["population"], "population")):
        name = f"population[{index}]"
        loss, key = array(entry, name, 2)
        levels = _key(key, name, units)
        cost = sum(unit.costs[level] for unit, level in zip(units, levels, strict=True))
        if cost > budget.limit:
            raise MspError(f"{name} costs {cost:,} of a budget of {budget.limit:,}")
        population.append((_loss(loss, name), levels))
    measured: dict[tuple[int, Key], float] = {}
    for index, entry in enumerate(array(content["measured"], "measured")):
        name = f"measured[{index}]"
        stage, key, loss = array(entry, name, 3)
        measured[whole(stage, name, 0, stages - 1), _key(key, name, units)] = _loss(loss, name)
    for index, (loss, levels) in enumerate(population):
        if measured.get((stages - 1, levels)) != loss:
            raise MspError(f"population[{index}] has another loss than was measured")
    if sorted(population) != population or len(set(population)) < len(population):
        raise MspError("population is not in the order of its losses")
    generation = whole(content["generation"], "generation")
    tokens = whole(content["tokens"], "tokens")
    history = [_step(entry, f"history[{index}]") for index, entry in enumerate(array(content["history"], "history"))]
    if not population or not history or history[-1].generation != generation or history[-1].tokens != tokens:
        raise MspError("history does not end where the search stopped")
    if history[-1].best != population[0][0]:
        raise MspError("history ends with another loss than the best individual has")
    first_stage = real(content["first_stage"], "first_stage", 0)
    effects: list[tuple[Key, Effects]] = []
    for index, entry in enumerate(array(content["effects"], "effects")):
        name = f"effects[{index}]"
        base, found = array(entry, name, 2)
        effects.append((_key(base, name, units), dict(_effect(move, name, units) for move in array(found, name))))
    return State(generation, population, measured, tokens, history, first_stage, effects)


def _key(value: object, name: str, units: Sequence[Unit]) -> Key:
    levels = array(value, name, len(units))
    return tuple(whole(level, f"{name}: {unit.name}", 0, unit.top) for level, unit in zip(levels, units, strict=True))


def _effect(value: object, name: str, units: Sequence[Unit]) -> tuple[tuple[int, int], float]:
    unit, direction, effect = array(value, name, 3)
    move = whole(unit, name, 0, len(units) - 1), whole(direction, name, -1, 1)
    if not move[1]:
        raise MspError(f"{name}: a move of 0 levels")
    return move, math.inf if effect is None else real(effect, name)


def _step(value: object, name: str) -> Step:
    entry = table(value, name, Step.__dataclass_fields__)
    if len(entry) > len(Step.__dataclass_fields__):
        raise MspError(f"{name} has entries that are not known")
    counts = (whole(entry[key], f"{name}.{key}") for key in ("generation", "evaluations", "tokens"))
    return Step(*counts, *(_loss(entry[key], f"{name}.{key}") for key in ("best", "mean")))


def _loss(value: object, name: str) -> float:
    return math.inf if value is None else real(value, name)


def _written(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
