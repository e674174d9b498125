"""What of a model is pruned: which linears in which units, with which patterns, to which budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from msp.as_loaded import FLOAT32, StoredDtypes
from msp.decode_table import DecodeTable
from msp.errors import UsageError
from msp.formats.storage import DENSE, Storage
from msp.model import Linear, Structure
from msp.patterns import Budget, NMPattern, Unit, check_group_size
from msp.reading import shown

UNITS = ("linear", "block")
BYTE_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
TIME_UNITS = {"us": 10**3, "ms": 10**6, "s": 10**9}
# Measured times that differ by less than this share of the dense one do not differ.
TIME_NOISE = Fraction(1, 100)


Rule = tuple[re.Pattern[str], Storage]


@dataclass(frozen=True)
class Plan:
    """Which linears are pruned in which units, what is left alone and why, and the budget.

    Attributes:
        objective: what the budget counts, ``weights``, ``bytes`` or ``nanoseconds``.
        fixed_cost: of that, what no level changes: linears left alone, and for bytes the rest of the model.
        dense_cost: what the dense model takes.
        skipped_weights: in linears left alone.
        total_weights: in all linears.
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
        """The budget over everything it counts."""
        return self.budget.limit + self.fixed_cost


@dataclass(frozen=True)
class Goal:
    """How much may stay: a share of the weights removed, bytes of the whole model when packed, or time to decode.

    Without any, what the lowest patterns keep: for linears that are all pinned.

    Attributes:
        sparsity: of all linears.
        bytes: what all tensors of the model may take as stored.
        other_bytes: of the tensors that are no weight of a linear.
        stored: the dtypes that weights are stored in, in the count of bytes.
        nanoseconds: what all linears may take together to decode a token, each called once, as ``table`` predicts it.
    """

    sparsity: Fraction | None
    bytes: int | None = None
    other_bytes: int = 0
    stored: StoredDtypes = FLOAT32
    nanoseconds: int | None = None
    table: DecodeTable | None = None

    @property
    def objective(self) -> str:
        if self.table is not None:
            return "nanoseconds"
        return "weights" if self.bytes is None else "bytes"

    def limit(self, total_weights: int) -> int | None:
        if self.sparsity is None:
            return self.bytes if self.table is None else self.nanoseconds
        return int((1 - self.sparsity) * total_weights)

    def describe(self, total_weights: int) -> str:
        limit = self.limit(total_weights)
        if self.sparsity is None:
            return f"a budget of {limit:,} {self.objective}"
        return f"sparsity {float(self.sparsity):g}, {limit:,} of {total_weights:,} weights,"

    def least_rise(self, linears: Sequence[Linear]) -> int:
        """How much less than a denser pattern another must cost to be worth having, for all of ``linears``."""
        if self.table is None:
            return 1
        return max(1, int(sum(self.cost(linear, DENSE) for linear in linears) * TIME_NOISE))

    def cost(self, linear: Linear, storage: Storage) -> int:
        """What ``linear`` takes in ``storage`` of what the goal limits.

        Raises:
            UsageError: the table has no time for that.
        """
        if self.table is not None:
            return self.table.nanoseconds(linear.shape, storage)
        if self.bytes is None:
            return storage.kept(*linear.shape)
        return storage.nbytes(*linear.shape, self.stored.of_linear(linear.name))


@dataclass(frozen=True)
class PatternRules:
    """Which patterns linears may have: the ``allowed`` ones, except where a rule pins one; without any, dense.

    Attributes:
        allowed: ascending in density.
        keep: rules: a regex that a linear's name must match from a dot (or its beginning) to its end, and the
            storage it is pinned to, a pattern's or ``DENSE``; the first that matches counts.
        exact: pinned storages by whole names.
    """

    allowed: tuple[NMPattern, ...]
    keep: tuple[Rule, ...] = ()
    exact: Mapping[str, Storage] = field(default_factory=dict)

    @classmethod
    def parse(
        cls, group_size: int, patterns: str | None = None, keep: str | None = None, *, compliant: bool = False
    ) -> PatternRules:
        """``patterns`` is ``"1:8,2:8"``, or None for all of one ``group_size``; ``keep`` ``"REGEX=N:M,REGEX=dense"``.

        ``compliant`` leaves of the patterns those that 2:4 sparse tensor cores run whatever is selected.

        Raises:
            UsageError: what is no pattern or no regex, a pattern named twice, or, of those named, one pinned or all
                listed that are not compliant where they must be.
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
        """All that a linear may get, ``allowed`` or pinned."""
        pinned = [storage for _, storage in self.keep] + list(self.exact.values())
        return tuple(dict.fromkeys([*self.allowed, *(each.support for each in pinned if each.support is not None)]))

    def rule_for(self, name: str) -> tuple[str, Storage] | None:
        """The rule, as it was written, that pins a linear, and its storage."""
        if name in self.exact:
            return name, self.exact[name]
        return next(((regex.pattern, storage) for regex, storage in self.keep if matches(regex, name)), None)


def matches(regex: re.Pattern[str], name: str) -> bool:
    """Whether ``regex`` matches all of ``name``, or all behind one of its dots."""
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
    """What a rule can pin a linear to: ``"N:M"`` or ``"dense"``; ``UsageError`` for anything else."""
    return DENSE if text.strip() == str(DENSE) else Storage(NMPattern.parse(text))


# No more digits than a 64-bit integer holds, so that no sum of such numbers leaves it by much.
_DECIMAL = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"


def parse_bytes(text: str | int) -> int:
    """``"1.5GB"``, ``"300 MB"``, ``"4096"``: whole bytes, in decimal units."""
    match = re.fullmatch(rf"\s*({_DECIMAL})\s*([kMG]?B)?\s*", text if isinstance(text, str) else shown(text))
    if match is None:
        raise UsageError(f"{shown(text)} is not a number of bytes, like 300MB or 1.5GB")
    return int(Fraction(match[1]) * BYTE_UNITS[match[2] or ""])


def parse_time(text: str) -> int:
    """``"12ms"``, ``"800 us"``, ``"1.5s"``: whole nanoseconds."""
    match = re.fullmatch(rf"\s*({_DECIMAL})\s*(us|ms|s)\s*", text)
    if match is None:
        raise UsageError(f"{shown(text)} is not a time, like 12ms or 800us")
    return int(Fraction(match[1]) * TIME_UNITS[match[2]])


def make_plan(structure: Structure, goal: Goal, rules: PatternRules, *, unit: str = "linear") -> Plan:
    """Split the linears into units and skipped ones, and share the budget.

    The budget counts all linears: what one that no pattern fits keeps too much, the others make good.

    Raises:
        UsageError: an unknown unit, a rule that fits nothing, nothing to prune, or a budget out of reach.
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
    """The patterns that ``linear`` may have, or why it stays dense."""
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
    """A unit whose levels rise in density and in cost: a pattern that costs no less than a denser one is left out."""
    levels: list[tuple[NMPattern, int]] = []
    least_rise = goal.least_rise(linears)
    for pattern in reversed(patterns):
        cost = sum(goal.cost(linear, Storage(pattern)) for linear in linears)
        if not levels or cost <= levels[-1][1] - least_rise:
            levels.append((pattern, cost))
    chosen, costs = zip(*reversed(levels), strict=True)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    names = tuple(linear.name for linear in linears)
    return Unit(name, names, weights, max(p.m for p in chosen), block, kind, chosen, costs)


def _check_rules(structure: Structure, rules: PatternRules) -> None:
    names = {linear.name for linear in structure.linears}
    missing = [name for name in rules.exact if name not in names]
    if missing:
        raise UsageError(f"{missing[0]!r} is no linear of the model; one is {structure.linears[0].name}")
    for regex, storage in rules.keep:
        # Saying of what is never pruned that it stays dense is no mistake.
        known = [*names, "lm_head"] if storage == DENSE else names
        if not any(matches(regex, name) for name in known):
            raise UsageError(f"{regex.pattern!r} matches no linear; one is {structure.linears[0].name}")
