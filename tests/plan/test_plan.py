"""Plans: patterns restricted and pinned, budgets in weights and in bytes, all met exactly."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from families import build, nm_unit
from hypothesis import given, settings
from hypothesis import strategies as st

from msp import ops
from msp.allocators import Problem, get_allocator
from msp.engine.operators import swap
from msp.errors import UsageError
from msp.formats.patterns import NMPattern
from msp.formats.storage import DENSE, Storage
from msp.models.as_loaded import StoredDtypes
from msp.models.structure import find_structure
from msp.plan.budget import Budget, Unit
from msp.plan.levels import cost, levels_from_densities, repair
from msp.plan.plans import Goal, PatternRules, make_plan, matches, parse_bytes, patterns_of

STRUCTURE = find_structure(build("llama"))
HALF = Goal(Fraction(1, 2))


def by_name(plan) -> dict[str, Unit]:
    return {unit.name: unit for unit in plan.units}


def labels(unit: Unit) -> list[str]:
    return [level.label for level in unit.levels]


@st.composite
def uneven_problems(draw: st.DrawFn) -> tuple[list[Unit], Budget]:
    """Units whose levels cost what they like, as long as it rises; some with one level only."""
    units = []
    for index in range(draw(st.integers(1, 5))):
        rises = draw(st.lists(st.sampled_from([1, 2, 7, 30, 97, 1000]), min_size=0, max_size=4))
        costs = tuple(np.cumsum([draw(st.integers(0, 50)), *rises]).tolist())
        units.append(nm_unit(f"u{index}", 64, 8, index, "k", costs))
    least, most = sum(unit.costs[0] for unit in units), sum(unit.costs[-1] for unit in units)
    return units, Budget.for_units(units, draw(st.integers(least, most)))


@settings(max_examples=150, deadline=None)
@given(uneven_problems(), st.integers(0, 2**32 - 1))
def test_uneven_costs_meet_the_budget(problem: tuple[list[Unit], Budget], seed: int) -> None:
    units, budget = problem
    rng = np.random.default_rng(seed)
    sums = [sum(chosen) for chosen in product(*(unit.costs for unit in units))]
    best = max(total for total in sums if total <= budget.limit)
    smallest = min((b - a for u in units for a, b in zip(u.costs, u.costs[1:], strict=False)), default=1)
    assert min(best, budget.limit - smallest + 1) <= max(budget.target_floor, min(sums)) <= best
    for levels in (
        repair(rng.integers(-2, 8, len(units)), units, budget, rng=rng),
        levels_from_densities(rng.uniform(0, 1, len(units)).tolist(), units, budget),
    ):
        assert budget.is_met(cost(levels, units))
        assert all(0 <= level <= unit.top for level, unit in zip(levels, units, strict=True))


def test_many_uneven_units_meet_the_budget_with_few_moves() -> None:
    rng = np.random.default_rng(3)
    units = []
    for index in range(60):
        costs = tuple(np.cumsum(rng.integers(1000, 9000, 9)).tolist())
        units.append(nm_unit(f"u{index}", 64, 8, index, "k", costs))
    budget = Budget.for_units(units, sum(unit.costs[3] for unit in units))
    for _ in range(20):
        start = repair(rng.integers(0, 9, len(units)), units, budget, rng=rng)
        assert budget.is_met(cost(start, units))
        moved = repair(swap(start, units, 1, rng), units, budget, rng=rng)
        assert budget.is_met(cost(moved, units))
        assert np.count_nonzero(moved != start) <= 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_byte_cost_is_what_packing_takes(dtype: torch.dtype) -> None:
    goal = Goal(None, bytes=1, stored=StoredDtypes({}, dtype, 0))
    for linear in STRUCTURE.linears[:7]:
        weight = linear.weight.to(dtype).contiguous()
        for n, m in ((0, 8), (1, 8), (3, 4), (5, 16)):
            packed = ops.nm_select(weight, NMPattern(n, m))
            assert goal.cost(linear, packed.storage) == packed.nbytes
        assert goal.cost(linear, DENSE) == goal.cost(linear, Storage(NMPattern(8, 8))) == weight.nbytes


def test_only_the_listed_patterns_are_levels() -> None:
    plan = make_plan(STRUCTURE, HALF, PatternRules.parse(8, "4:8, 2:8,6:8"))
    assert {patterns_of(unit) for unit in plan.units} == {tuple(NMPattern(n, 8) for n in (2, 4, 6))}
    rng = np.random.default_rng(0)
    levels = levels_from_densities([0.5] * len(plan.units), plan.units, plan.budget)
    for _ in range(60):
        levels = repair(swap(levels, plan.units, 1, rng), plan.units, plan.budget, rng=rng)
        assert plan.budget.is_met(cost(levels, plan.units))


def test_patterns_of_several_group_sizes_go_where_they_fit() -> None:
    model = build("llama")
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(68, 32, bias=False)
    plan = make_plan(find_structure(model), HALF, PatternRules.parse(8, "1:4,2:4,2:8,6:8,7:16,3:4"))
    units = by_name(plan)
    # Of two that keep as much, the larger group leaves more choice.
    assert labels(units["model.layers.0.self_attn.q_proj"]) == ["2:8", "7:16", "2:4", "6:8"]
    assert labels(units["model.layers.0.mlp.down_proj"]) == ["1:4", "2:4", "3:4"]
    with pytest.raises(UsageError, match="multiple of 16, 32 input"):
        model = build("llama")
        for block in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                block.self_attn.set_submodule(name, torch.nn.Linear(40, 32))
            for name in ("gate_proj", "up_proj", "down_proj"):
                block.mlp.set_submodule(name, torch.nn.Linear(40, 32))
        make_plan(find_structure(model), HALF, PatternRules.parse(8, "1:16,4:32"))


def test_pinned_linears_have_one_level_or_stay_dense() -> None:
    rules = PatternRules.parse(8, keep="layers.0.*=4:8,.*down_proj=dense,lm_head=dense")
    plan = make_plan(STRUCTURE, HALF, rules)
    units = by_name(plan)
    assert all(labels(unit) == ["4:8"] for unit in plan.units if unit.block == 0)
    # The first rule that matches counts.
    assert units["model.layers.0.mlp.down_proj"].top == 0
    dense = {"model.layers.1.mlp.down_proj": "kept dense by .*down_proj=dense"}
    assert plan.skipped == {**dense, "lm_head": "the output head"}
    found = get_allocator("ramp").allocate(Problem(plan.units, plan.budget, None))  # type: ignore[arg-type]
    patterns = plan.allocation(found.levels)
    assert str(patterns["model.layers.0.self_attn.v_proj"]) == "4:8"
    assert plan.limit == int(plan.total_weights / 2)
    for unit in ("linear", "block"):
        blocks = make_plan(STRUCTURE, HALF, PatternRules.parse(8, keep=".*k_proj=1:8"), unit=unit)
        assert [u.levels[0].label for u in blocks.units if u.top == 0] == ["1:8", "1:8"]


def test_compliant_patterns_keep_two_at_most() -> None:
    rules = PatternRules.parse(8, "0:8,1:4,2:4,3:4,2:8,3:8,2:16,8:8", "layers.0.*=2:4,lm_head=dense", compliant=True)
    assert {str(pattern) for pattern in rules.allowed} == {"0:8", "1:4", "2:4", "2:8", "2:16"}
    assert all(
        p.always_compliant
        for unit in make_plan(STRUCTURE, Goal(Fraction(3, 5)), rules).units
        for p in patterns_of(unit)
    )
    assert PatternRules.parse(4, compliant=True).allowed == tuple(NMPattern(n, 4) for n in range(3))
    with pytest.raises(UsageError, match=r"layers\.0\.\*=3:8 is not compliant"):
        PatternRules.parse(8, keep="layers.0.*=3:8", compliant=True)
    with pytest.raises(UsageError, match="none of 3:8,4:8 is compliant"):
        PatternRules.parse(8, "3:8,4:8", compliant=True)


@pytest.mark.parametrize(
    ("regex", "name", "found"),
    [
        (r"layers.0.*", "model.layers.0.mlp.up_proj", True),
        (r"layers.0", "model.layers.0.mlp.up_proj", False),
        (r"layers\.1\..*", "model.layers.11.mlp.up_proj", False),
        (r"ayers.0.*", "model.layers.0.mlp.up_proj", False),
        (r"up_proj", "model.layers.0.mlp.up_proj", True),
        (r"model\..*", "model.layers.0.mlp.up_proj", True),
    ],
)
def test_a_rule_matches_from_a_dot_to_the_end(regex: str, name: str, found: bool) -> None:
    assert matches(PatternRules.parse(8, keep=f"{regex}=1:8").keep[0][0], name) is found


@pytest.mark.parametrize(
    ("patterns", "keep", "message"),
    [
        ("2:8,9:8", None, "9:8"),
        ("2:8,2:8", None, "more than once"),
        ("", None, "not a pattern"),
        ("2:6", None, "4, 8, 16, 32"),
        (None, "layers.0", "REGEX=N:M"),
        (None, "=2:8", "REGEX=N:M"),
        (None, "(=2:8", "regular expression"),
        (None, "up_proj=half", "not a pattern"),
        (None, "nothing=2:8", "matches no linear"),
        (None, "nothing=dense", "matches no linear"),
        (None, "lm_head=2:8", "matches no linear"),
        ("0:8,1:8", None, "more than the patterns keep"),
        ("6:8,8:8", None, "out of reach"),
        (None, ".*proj=dense", "multiple of 8"),
    ],
)
def test_wrong_rules_are_refused(patterns: str | None, keep: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(STRUCTURE, HALF, PatternRules.parse(8, patterns, keep))


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), (77, 77), ("1.5GB", 1_500_000_000), (" 300 MB", 300_000_000), ("2kB", 2000)]
)
def test_bytes_are_read_in_decimal_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "many", "3 TB", "-4", "1e9", "GB", "9" * 5000, "１２", "nan", "infGB"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="bytes"):
        parse_bytes(text)
