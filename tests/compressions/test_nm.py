"""N:M as a compression: switches, their memory, and what finally stands in the model."""

from __future__ import annotations

import gc
import pickle
import random
from fractions import Fraction

import pytest
import torch
from families import build, nm_units, tokens
from torch import nn

from msp import ops
from msp.compressions.nm import Candidates, NMCompression
from msp.compressions.nm_database import PackedLevels
from msp.compressions.nm_weights import Room
from msp.engine.candidates import CandidateModel
from msp.engine.evolution import asked
from msp.errors import UsageError
from msp.formats.patterns import NMPattern
from msp.models.structure import Linear, Structure, find_structure
from msp.plan.budget import Level, Unit, parse_sparsity
from msp.plan.plans import Goal, PatternRules, make_plan


def ranks_of(linears: tuple[Linear, ...]) -> Candidates:
    return {each.name: {8: ops.nm_rank(each.weight.contiguous(), 8)} for each in linears}


def database_of(linears: tuple[Linear, ...]) -> Candidates:
    """Random values at every pattern, so that they differ from the model's own."""
    found = {}
    for linear in linears:
        weights = {n: torch.randn(linear.shape) for n in range(1, 8)}
        found[linear.name] = PackedLevels(
            {NMPattern(n, 8): ops.nm_select(weight, NMPattern(n, 8)) for n, weight in weights.items()}
        )
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("source", [ranks_of, database_of])
def test_settled_weights_are_those_of_the_switch(family: str, source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    model = build(family)
    structure = find_structure(model)
    compression, units = NMCompression(structure, source(structure.linears)), nm_units(structure.linears)
    levels = [0, 8, *(random.randint(0, 8) for _ in units[2:])]
    prompt = tokens(2, 9, seed=1)
    with CandidateModel(model, structure, compression, units) as candidate, torch.no_grad():
        candidate.apply(levels)
        expected = model(input_ids=prompt).logits
    modules: dict[str, nn.Module] = {}
    for unit, level in zip(units, levels, strict=True):
        assert compression.levels(unit) == unit.levels
        modules |= compression.settle(unit, level)
    assert len(modules) == sum(level < 8 for level in levels)
    with structure.replaced(modules), torch.no_grad():
        torch.testing.assert_close(model(input_ids=prompt).logits, expected)


def test_copies_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    structure = find_structure(model)
    units = nm_units(structure.linears)
    nbytes = sum(each.weight.nbytes for each in structure.linears)
    monkeypatch.setattr("msp.compressions.nm.COPIED_BYTES", nbytes)
    compression = NMCompression(structure, ranks_of(structure.linears))
    for _ in range(3):
        with CandidateModel(model, structure, compression, units) as candidate:
            candidate.apply([4] * len(units))
            assert compression._room._left == 0
            assert pickle.loads(pickle.dumps(compression._room))._left == nbytes, "elsewhere nothing is taken"
        gc.collect()
        assert compression._room._left == nbytes


def test_a_room_gives_what_is_left() -> None:
    room, first, second = Room(10), nn.Identity(), nn.Identity()
    assert room.take(first, 6) and not room.take(second, 5) and room.take(second, 4)
    del first
    assert room.take(second, 6) and not room.take(second, 1)


def test_a_label_that_is_no_pattern_is_no_level() -> None:
    unit = Unit("a", ("a",), 16, 0, "k", (Level(0, Fraction(0), "x0"),))
    with pytest.raises(UsageError, match="'x0' is not a pattern"):
        NMCompression(Structure(())).levels(unit)


def test_the_identity_of_a_search_is_that_of_older_checkpoints() -> None:
    """These hashes were written when a unit had patterns and no levels."""
    rules = PatternRules.parse(8, "0:8,1:8,3:8,2:4,7:16,8:8", "layers.0.*k_proj=4:8")
    plan = make_plan(find_structure(build("llama")), Goal(parse_sparsity(0.5)), rules, unit="block")
    assert asked(plan.units, plan.budget, 3) == {
        "seed": "3",
        "budget": "10240",
        "patterns": "xxh3:b71a1f85a61b01e30c864db4ea012b16",
        "costs of the patterns": "xxh3:3c9e45c04667e22d0c9a3f1af693081d",
    }
    for database, name in ((False, "ranks"), (True, "database")):
        assert NMCompression(Structure(()), database=database).identity == {"candidates": name}
