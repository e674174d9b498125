"""The plan of a run: the linears to prune, their units, their patterns and the budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from msp.base.reading import shown
from msp.errors import UsageError
from msp.formats.patterns import Allocation, NMPattern, check_group_size
from msp.formats.storage import DENSE, Storage
from msp.models.as_loaded import FLOAT32, StoredDtypes
from msp.models.structure import Linear, Structure
from msp.plan.budget import Budget, Level, Unit
from msp.plan.decode_table import DecodeTable
from msp.plan.levels import Levels

UNITS = ("linear", "block")
BYTE_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
TIME_UNITS = {"us": 10**3, "ms": 10**6, "s": 10**9}
# Two measured times count as equal if they differ by less than this share of the dense time.
TIME_NOISE = Fraction(1, 100)


Rule = tuple[re.Pattern[str], Storage]


@dataclass(frozen=True)
class Plan:
    """The units to prune, the skipped linears, and the budget.

    Attributes:
        units: the units that get levels.
        skipped: the linears that stay dense, with the reason.
        budget: the budget that the units share.
        objective: the unit of the budget: ``weights``, ``bytes`` or ``nanoseconds``.
        fixed_cost: the cost that no level changes: the skipped linears and, for bytes, the rest of the model.
        dense_cost: the cost of the dense model.
        skipped_weights: the number of weights in skipped linears.
        total_weights: the number of weights in all linears.
    """

    units: tuple[Unit, ...]
    skipped: Mapping[str, str]
    budget: Budget
    objective: str
    fixed_cost: int
    dense_cost: int
    skipped_weights: int
    total_weights: int

    @property
    def limit(self) -> int:
        """The budget of the whole model: the budget of the units and the fixed cost."""
        return self.budget.limit + self.fixed_cost

    def allocation(self, levels: Levels | Sequence[int]) -> Allocation:
        """The pattern of every linear of every unit, from the level of every unit."""
        chosen = zip(self.units, levels, strict=True)
        return Allocation({name: patterns_of(unit)[level] for unit, level in chosen for name in unit.linears})


@dataclass(frozen=True)
class Goal:
    """The goal of pruning: a share of removed weights, bytes of the packed model, or time to decode.

    If none is given, the budget is the cost of the lowest patterns; this serves a model whose linears are all pinned.

    Attributes:
        sparsity: the share of the weights of all linears to remove.
        bytes: the most bytes of all tensors of the model as stored.
        other_bytes: the bytes of the tensors that are not weights of linears.
        stored: the dtypes of the stored weights, for the count of bytes.
        nanoseconds: the most time that all linears together take to decode a token, each called once.
        table: the decode times that predict it; needed before anything is counted in nanoseconds.
    """

    sparsity: Fraction | None
    bytes: int | None = None
    other_bytes: int = 0
    stored: StoredDtypes = FLOAT32
    nanoseconds: int | None = None
    table: DecodeTable | None = None

    @property
    def objective(self) -> str:
        if self.nanoseconds is not None:
            return "nanoseconds"
        return "weights" if self.bytes is None else "bytes"

    def limit(self, total_weights: int) -> int | None:
        if self.sparsity is None:
            return self.bytes if self.nanoseconds is None else self.nanoseconds
        return int((1 - self.sparsity) * total_weights)

    def describe(self, total_weights: int) -> str:
        limit = self.limit(total_weights)
        if self.sparsity is None:
            return f"a budget of {limit:,} {self.objective}"
        return f"sparsity {float(self.sparsity):g}, {limit:,} of {total_weights:,} weights,"

    def least_rise(self, linears: Sequence[Linear]) -> int:
        """The least difference in cost between two patterns of ``linears`` for which both are kept as levels."""
        if self.table is None:
            return 1
        return max(1, int(sum(self.cost(linear, DENSE) for linear in linears) * TIME_NOISE))

    def cost(self, linear: Linear, storage: Storage) -> int:
        """The cost of ``linear`` in ``storage``, in the unit of the goal.

        Raises:
            UsageError: the table has no time for this shape and storage.
        """
        if self.table is not None:
            return self.table.nanoseconds(linear.shape, storage)
        if self.bytes is None:
            return storage.kept(*linear.shape)
        return storage.nbytes(*linear.shape, self.stored.of_linear(linear.name))


@dataclass(frozen=True)
class PatternRules:
    """The patterns that linears may have: the ``allowed`` ones, unless a rule pins the linear.

    If no pattern is allowed, linears without a rule stay dense.

    Attributes:
        allowed: the patterns in rising density.
        keep: rules, each with a regex and the storage, a pattern's or ``DENSE``, that it pins a linear to. The regex
            must match the linear's name from its beginning, or from after a dot, to its end. The first match counts.
        exact: the pinned storage of each linear by its whole name.
    """

    allowed: tuple[NMPattern, ...]
    keep: tuple[Rule, ...] = ()
    exact: Mapping[str, Storage] = field(default_factory=dict)

    @classmethod
    def parse(
        cls, group_size: int, patterns: str | None = None, keep: str | None = None, *, compliant: bool = False
    ) -> PatternRules:
        """The rules from the texts of a user.

        Args:
            group_size: M of the allowed patterns if ``patterns`` is None.
            patterns: the allowed patterns, like ``"1:8,2:8"``.
            keep: the rules, like ``"REGEX=N:M,REGEX=dense"``.
            compliant: allow only the patterns that 2:4 sparse tensor cores run for any choice of weights.

        Raises:
            UsageError: a pattern or a regex is malformed, or a pattern is named twice; or, with ``compliant``, a pinned
                pattern is not compliant, or none of ``patterns`` is.
        """
        if patterns is None:
            size = check_group_size(group_size)
            allowed = [NMPattern(n, size) for n in range(size + 1)]
        else:
            allowed = [NMPattern.parse(text) for text in patterns.split(",")]
        if len(set(allowed)) < len(allowed):
            raise UsageError(f"patterns {patterns} name one more than once")
        rules = [_parse_rule(text) for text in keep.split(",")] if keep is not None else []
        if compliant:
            for regex, pinned in rules:
                if pinned.support is not None and not pinned.support.always_compliant:
                    raise UsageError(f"{regex.pattern}={pinned} is not compliant: at most 2 of every M may stay")
            allowed = [pattern for pattern in allowed if pattern.always_compliant]
            if not allowed:
                raise UsageError(f"none of {patterns} is compliant: at most 2 of every M may stay")
        return cls(tuple(sorted(allowed, key=lambda pattern: (pattern.density, pattern.m))), tuple(rules))

    @property
    def patterns(self) -> tuple[NMPattern, ...]:
        """All patterns that a linear may get, allowed or pinned."""
        pinned = [storage for _, storage in self.keep] + list(self.exact.values())
        return tuple(dict.fromkeys([*self.allowed, *(each.support for each in pinned if each.support is not None)]))

    def rule_for(self, name: str) -> tuple[str, Storage] | None:
        """The text and the storage of the rule that pins a linear; None if there is no such rule."""
        if name in self.exact:
            return name, self.exact[name]
        return next(((regex.pattern, storage) for regex, storage in self.keep if matches(regex, name)), None)


def matches(regex: re.Pattern[str], name: str) -> bool:
    """Whether ``regex`` matches all of ``name``, or all of it after one of its dots."""
    starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
    return any(regex.fullmatch(name, start) for start in starts)


def _parse_rule(text: str) -> Rule:
    regex, found, storage = text.strip().rpartition("=")
    if not found or not regex:
        raise UsageError(f"{text!r} is not REGEX=N:M or REGEX=dense")
    try:
        compiled = re.compile(regex)
    except re.error as error:
        raise UsageError(f"{regex!r} is not a regular expression: {error}") from error
    return compiled, parse_pinned(storage)


def parse_pinned(text: str) -> Storage:
    """The storage that a rule names: ``"N:M"`` or ``"dense"``; ``UsageError`` for any other text."""
    return DENSE if text.strip() == str(DENSE) else Storage(NMPattern.parse(text))


# At most as many digits as a 64-bit integer holds, so that sums of such numbers exceed it by little.
_DECIMAL = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"


def parse_bytes(text: str | int) -> int:
    """The whole bytes of a text in decimal units, like ``"1.5GB"``, ``"300 MB"`` or ``"4096"``."""
    match = re.fullmatch(rf"\s*({_DECIMAL})\s*([kMG]?B)?\s*", text if isinstance(text, str) else shown(text))
    if match is None:
        raise UsageError(f"{shown(text)} is not a number of bytes, like 300MB or 1.5GB")
    return int(Fraction(match[1]) * BYTE_UNITS[match[2] or ""])


def parse_time(text: str) -> int:
    """The whole nanoseconds of a text like ``"12ms"``, ``"800 us"`` or ``"1.5s"``."""
    match = re.fullmatch(rf"\s*({_DECIMAL})\s*(us|ms|s)\s*", text)
    if match is None:
        raise UsageError(f"{shown(text)} is not a time, like 12ms or 800us")
    return int(Fraction(match[1]) * TIME_UNITS[match[2]])


def make_plan(structure: Structure, goal: Goal, rules: PatternRules, *, unit: str = "linear") -> Plan:
    """Split the linears into units and skipped linears, and compute the budget of the units.

    The budget counts all linears. If no pattern fits a linear, it stays dense, and the other linears pay for it.

    Raises:
        UsageError: the unit is unknown, a rule matches no linear, there is nothing to prune, or the budget is out of
            reach.
    """
    if unit not in UNITS:
        raise UsageError(f"unit {unit!r} is not one of {', '.join(UNITS)}")
    _check_rules(structure, rules)
    skipped = structure.skipped
    units: list[Unit] = []
    fixed, skipped_weights, total = goal.other_bytes, 0, 0
    for block in structure.blocks:
        together = []
        for linear in block.linears:
            rows, columns = linear.shape
            total += rows * columns
            patterns, reason = _patterns_for(linear, rules)
            if not patterns:
                skipped[linear.name] = reason
                skipped_weights += rows * columns
                fixed += goal.cost(linear, DENSE)
            elif unit == "linear" or len(patterns) == 1:
                units.append(_unit(linear.name, [linear], patterns, goal, block.index, linear.kind))
            else:
                together.append((linear, patterns))
        if together:
            shared = [p for p in together[0][1] if all(p in patterns for _, patterns in together)]
            if not shared:
                raise UsageError(f"no pattern fits all linears of {block.name}, as --unit block needs")
            units.append(_unit(block.name, [linear for linear, _ in together], shared, goal, block.index, "block"))
    if not units and not rules.allowed:
        raise UsageError("the allocation keeps every linear dense: there is nothing to prune")
    if not units:
        sizes = ", ".join(map(str, sorted({pattern.m for pattern in rules.allowed})))
        raise UsageError(f"no linear has a multiple of {sizes} input features: choose another group size")
    least, most = (fixed + sum(unit.costs[end] for unit in units) for end in (0, -1))
    wished = goal.limit(total)
    limit = least if wished is None else wished
    if limit < least:
        raise UsageError(f"{goal.describe(total)} is out of reach: {least:,} stay with the lowest patterns")
    try:
        budget = Budget.for_units(units, limit - fixed)
    except UsageError as error:
        raise UsageError(f"{goal.describe(total)} is more than the patterns keep, {most:,}") from error
    dense = goal.other_bytes + sum(goal.cost(linear, DENSE) for linear in structure.linears)
    return Plan(tuple(units), skipped, budget, goal.objective, fixed, dense, skipped_weights, total)


def _patterns_for(linear: Linear, rules: PatternRules) -> tuple[list[NMPattern], str]:
    """The patterns that ``linear`` may have, and the reason for it to stay dense if there are none."""
    columns = linear.shape[1]
    rule = rules.rule_for(linear.name)
    if rule is not None:
        text, storage = rule
        pattern = storage.support
        if pattern is None:
            return [], f"kept dense by {text}=dense"
        if columns % pattern.m:
            raise UsageError(f"{text}={pattern}: {linear.name} has {columns} input features")
        return [pattern], ""
    if not rules.allowed:
        return [], "not in the allocation"
    fitting = [pattern for pattern in rules.allowed if columns % pattern.m == 0]
    sizes = sorted({pattern.m for pattern in rules.allowed})
    if len(sizes) == 1:
        return fitting, f"{columns} input features are not a multiple of the group size {sizes[0]}"
    return fitting, f"{columns} input features are a multiple of none of the group sizes {', '.join(map(str, sizes))}"


def _unit(
    name: str, linears: Sequence[Linear], patterns: Sequence[NMPattern], goal: Goal, block: int, kind: str
) -> Unit:
    """A unit whose levels rise in density and cost; a pattern that costs as much as a denser one is left out."""
    levels: list[Level] = []
    least_rise = goal.least_rise(linears)
    for pattern in reversed(patterns):
        cost = sum(goal.cost(linear, Storage(pattern)) for linear in linears)
        if not levels or cost <= levels[-1].cost - least_rise:
            levels.append(Level(cost, pattern.density, str(pattern)))
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    return Unit(name, tuple(linear.name for linear in linears), weights, block, kind, tuple(reversed(levels)))


def patterns_of(unit: Unit) -> tuple[NMPattern, ...]:
    """The pattern of every level of ``unit``; ``UsageError`` if a label is not a pattern."""
    return tuple(NMPattern.parse(level.label) for level in unit.levels)


def _check_rules(structure: Structure, rules: PatternRules) -> None:
    names = {linear.name for linear in structure.linears}
    missing = [name for name in rules.exact if name not in names]
    if missing:
        raise UsageError(f"{missing[0]!r} is no linear of the model; one is {structure.linears[0].name}")
    for regex, storage in rules.keep:
        # A rule that keeps the output head dense is valid, although the head is never pruned.
        known = [*names, "lm_head"] if storage == DENSE else names
        if not any(matches(regex, name) for name in known):
            raise UsageError(f"{regex.pattern!r} matches no linear; one is {structure.linears[0].name}")
