from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from msp.errors import UsageError
from msp.formats.patterns import NMPattern
from msp.ops import nm_rank
from msp.pruners import KeepingPruner, LinearStatistics, Scoring, get_pruner, pruner_names, register_pruner
from msp.pruners.base import PRUNERS, STATISTICS

BUILT_IN = ("fisher", "magnitude", "ria", "sparsegpt", "wanda")


@pytest.fixture
def registry(monkeypatch):
    """Whatever the test registers is forgotten afterwards."""
    before = dict(PRUNERS.factories)
    yield
    PRUNERS.factories.clear()
    PRUNERS.factories.update(before)


def test_the_built_in_ones_are_there():
    assert set(BUILT_IN) <= set(pruner_names())
    assert list(pruner_names()) == sorted(pruner_names())
    for name in BUILT_IN:
        pruner = get_pruner(name)
        assert pruner.name == name
        assert pruner.needs <= STATISTICS
        assert pruner.updates_weights == (name == "sparsegpt")
        with pytest.raises(dataclasses.FrozenInstanceError):
            pruner.exponent = 1


def test_a_pruner_of_ones_own_takes_a_few_lines(registry):
    @register_pruner
    @dataclass(frozen=True)
    class Smallest(KeepingPruner):
        name: ClassVar[str] = "smallest"
        offset: float = 0.0

        def scoring(self, weight, statistics):
            return Scoring(scores=self.offset - weight.float().abs())

    assert "smallest" in pruner_names()
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    pruner = get_pruner("smallest", offset=4.0)
    packed = pruner.prune(weight, LinearStatistics(), NMPattern(2, 4))
    assert packed.unpack().tolist() == [[0, -1, 0, 0.5]]
    assert nm_rank(weight, 4, **pruner.scoring(weight, LinearStatistics()).kwargs()).tolist() == [[3, 1, 2, 0]]
    with pytest.raises(UsageError, match="'smallest' has no option 'ofset'; its options: offset"):
        get_pruner("smallest", ofset=1)


def test_so_does_one_that_shares_no_code_with_ours(registry):
    class First:
        name = "first"
        needs = frozenset()
        updates_weights = False

        def scoring(self, weight, statistics):
            return Scoring(scores=torch.arange(weight.shape[1], 0, -1.0).expand(weight.shape))

        def prune(self, weight, statistics, pattern, *, name="", warn=None):
            raise NotImplementedError

    def make(**options):
        assert options == {"anything": 1}
        return First()

    make.name = "first"
    register_pruner(make)
    assert isinstance(get_pruner("first", anything=1), First)


def test_unknown_names_and_options_list_the_known_ones():
    with pytest.raises(UsageError, match="'wandb' is not one of fisher, magnitude, ria, sparsegpt, wanda"):
        get_pruner("wandb")
    with pytest.raises(UsageError, match="'ria' has no option 'a'; its options: exponent"):
        get_pruner("ria", a=0.5)
    with pytest.raises(UsageError, match="'magnitude' has no option 'exponent'; its options: none"):
        get_pruner("magnitude", exponent=0.5)


def test_a_name_belongs_to_one_pruner(registry):
    @dataclass(frozen=True)
    class Impostor(KeepingPruner):
        name: ClassVar[str] = "wanda"

        def scoring(self, weight, statistics):
            return Scoring()

    with pytest.raises(UsageError, match=r"'wanda' is registered already: msp\.pruners\.wanda\.WandaPruner"):
        register_pruner(Impostor)
    with pytest.raises(UsageError, match="has no `name`"):
        register_pruner(lambda: Impostor())
    register_pruner(type(get_pruner("wanda")))  # the same one again, as a reload does


def test_a_scoring_passes_on_what_it_holds():
    scale = torch.rand(4)
    assert Scoring().kwargs() == {}
    assert list(Scoring(column_scale=scale, row_term=scale).kwargs()) == ["column_scale", "row_term"]
    assert Scoring(importance=scale).kwargs()["importance"] is scale
