"""Allocations and recipes on disk."""

from pathlib import Path

import pytest
import yaml
from families import build

from msp.base.outputs import MARK
from msp.errors import MspError, UsageError
from msp.formats.patterns import Allocation, NMPattern
from msp.models.structure import find_structure
from msp.plan.plans import Goal, make_plan
from msp.plan.recipe import read_rules, write_allocation

STRUCTURE = find_structure(build("llama"))
NAMES = [linear.name for linear in STRUCTURE.linears]


def patterns_under(path: Path) -> dict[str, str]:
    plan = make_plan(STRUCTURE, Goal(None), read_rules(path))
    assert all(unit.top == 0 for unit in plan.units)
    assert plan.limit == plan.fixed_cost + sum(unit.costs[0] for unit in plan.units)
    return {name: unit.levels[0].label for unit in plan.units for name in unit.linears}


@pytest.mark.parametrize("file", ["allocation.json", "recipe.yaml"])
def test_what_is_written_is_read_again(file: str, tmp_path: Path) -> None:
    mixed = ["2:8", "0:8", "8:8", "3:16", "1:4"]
    allocation = Allocation.from_strings({name: mixed[i % 5] for i, name in enumerate(NAMES)})
    write_allocation(tmp_path, Allocation.from_strings({"other": "2:8"}), {})
    made_by = {"pruner": "wanda", "search": {"token_shares": (0.5, 1.0)}, "sparsity": 0.75}
    write_allocation(tmp_path, allocation, made_by)
    assert patterns_under(tmp_path / file) == allocation.to_strings()
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "allocation.json", "recipe.yaml"]
    # Any reader of YAML sees text, not numbers in base 60.
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    modifier = content["pruning_stage"]["pruning_modifiers"]["NMPruningModifier"]
    assert modifier["patterns"] == allocation.to_strings()
    assert content["made_by"]["search"] == {"token_shares": [0.5, 1.0]}


def test_a_recipe_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(
        """
        first_stage:
          any_modifiers:
            NMPruningModifier:
              patterns:
                model.layers.1.mlp.up_proj: 5:8
                re:layers.0.*: 4:8
        second_stage:
          run_type: oneshot
          sparsity_modifiers:
            SomebodyElsesModifier: {sparsity: 0.5}
            NMPruningModifier:
              patterns: {re:.*down_proj: dense, "re:.*(q|k)_proj": 1:16, re:.*: "2:8"}
        """
    )
    found = patterns_under(path)
    assert found["model.layers.1.mlp.up_proj"] == "5:8"
    assert {found[name] for name in NAMES if "layers.0" in name} == {"4:8"}
    assert "model.layers.1.mlp.down_proj" not in found
    assert found["model.layers.1.self_attn.k_proj"] == "1:16"
    assert found["model.layers.1.self_attn.v_proj"] == "2:8"


def test_linears_without_a_rule_stay_dense(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(f'{{"{NAMES[3]}": "2:8"}}')
    plan = make_plan(STRUCTURE, Goal(None), read_rules(tmp_path / "one.json"))
    assert [unit.name for unit in plan.units] == [NAMES[3]]
    skipped = {name: reason for name, reason in plan.skipped.items() if name in NAMES}
    assert set(skipped.values()) == {"not in the allocation"} and len(skipped) == len(NAMES) - 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"x": 3}', "JSON object"),
        ("a.json", '{"x": "9:8"}', "a.json.*9:8"),
        ("a.yaml", "", "no recipe"),
        ("a.yaml", "- 1", "no recipe"),
        ("a.yaml", "s: {m: {SparseGPTModifier: {sparsity: 0.5}}}", "no recipe"),
        ("a.yaml", "s: {m: {NMPruningModifier: {patterns: {re:(: 2:8}}}}", "a.yaml: 're:"),
        ("a.yaml", "s: {m: {NMPruningModifier: {patterns: {x: half}}}}", "'x': 'half' is not a pattern"),
        ("a.yaml", "s: {m: {NMPruningModifier: {patterns: {x: [1]}}}}", "a.yaml: 'x': .* is not a pattern"),
        ("a.yaml", "s: !!python/object/apply:os.system [ls]\n  {", "cannot be read"),
    ],
)
def test_what_is_no_recipe_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MspError, match=message):
        read_rules(tmp_path / name)
    with pytest.raises(MspError, match="cannot be read"):
        read_rules(tmp_path / f"gone-{name}")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"model.layers.7.mlp.up_proj": "2:8"}, "no linear of the model"),
        ({NAMES[0]: "0:8", "lm_head": "2:8"}, "no linear of the model"),
        ({}, "nothing to prune"),
    ],
)
def test_an_allocation_of_another_model_is_refused(patterns: dict[str, str], message: str, tmp_path: Path) -> None:
    allocation = Allocation({name: NMPattern.parse(text) for name, text in patterns.items()})
    write_allocation(tmp_path, allocation, {})
    with pytest.raises(UsageError, match=message):
        make_plan(STRUCTURE, Goal(None), read_rules(tmp_path / "allocation.json"))
