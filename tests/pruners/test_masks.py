"""Which weights the pruners that keep values choose, against dense NumPy computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.pruners import LinearStatistics, get_pruner

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 4, "2:4"), (1, 16, "3:8"), (13, 48, "1:4"), (37, 96, "2:8"), (6, 64, "5:16"), (5, 96, "7:32")]


def make(rows, columns, dtype, seed, tokens=57):
    """A weight, and the statistics of tokens whose channels differ widely in size."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns).to(dtype)
    inputs = torch.randn(tokens, columns) * torch.randn(columns).exp()
    gradients = torch.randn(4, rows, columns).exp() * 1e-6
    statistics = LinearStatistics(
        tokens=tokens,
        input_sum_squares=inputs.square().sum(0),
        hessian=inputs.T @ inputs,
        fisher=gradients.square().sum(0),
        sequences=4,
    )
    return weight, inputs, gradients, statistics


def magnitude(w, inputs, gradients):
    return np.abs(w)


def wanda(w, inputs, gradients):
    return np.abs(w) * np.linalg.norm(inputs, axis=0)


def ria(w, inputs, gradients, exponent=0.5):
    size = np.abs(w)
    relative = size / size.sum(axis=0, keepdims=True) + size / size.sum(axis=1, keepdims=True)
    return relative * np.linalg.norm(inputs, axis=0) ** exponent


def fisher(w, inputs, gradients):
    return w**2 * np.sum(gradients**2, axis=0)


DENSE = {"magnitude": magnitude, "wanda": wanda, "ria": ria, "fisher": fisher}


def best_of_each_group(scores, n, m):
    """Row by row and group by group, in float64."""
    kept = np.zeros(scores.shape, dtype=bool)
    for r, row in enumerate(scores):
        for first in range(0, len(row), m):
            order = np.argsort(-row[first : first + m], kind="stable")
            kept[r, first + order[:n]] = True
    return torch.from_numpy(kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_keeps_what_a_dense_computation_keeps(name, shape, dtype):
    rows, columns, text = shape
    pattern = NMPattern.parse(text)
    weight, inputs, gradients, statistics = make(rows, columns, dtype, seed=rows * columns)
    scores = DENSE[name](weight.double().numpy(), inputs.double().numpy(), gradients.double().numpy())
    packed = get_pruner(name).prune(weight, statistics, pattern)
    assert torch.equal(packed.kept(), best_of_each_group(scores, pattern.n, pattern.m))
    assert torch.equal(packed.unpack(), weight * packed.kept())
    assert packed.dtype == dtype and packed.pattern == pattern


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_exponent_of_ria(exponent):
    weight, inputs, _, statistics = make(24, 64, torch.float32, seed=1)
    scores = ria(weight.double().numpy(), inputs.double().numpy(), None, exponent)
    packed = get_pruner("ria", exponent=exponent).prune(weight, statistics, NMPattern(2, 8))
    assert torch.equal(packed.kept(), best_of_each_group(scores, 2, 8))


@pytest.mark.parametrize("name", [*DENSE, "sparsegpt"])
def test_inputs_that_were_never_active_are_the_first_to_go(name):
    weight, _, _, statistics = make(9, 32, torch.float32, seed=2)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 5, 6, 31]] = True
    statistics.input_sum_squares[dead] = 0
    statistics.hessian[dead] = 0
    statistics.hessian[:, dead] = 0
    statistics.fisher[:, dead] = 0
    packed = get_pruner(name).prune(weight, statistics, NMPattern(2, 8))
    if name != "magnitude":
        assert not packed.kept()[:, dead].any()
    assert packed.kept().view(9, 4, 8).sum(2).eq(2).all()


@pytest.mark.parametrize("name", [*DENSE, "sparsegpt"])
def test_nothing_was_active_and_rows_or_columns_are_empty(name):
    weight, _, _, statistics = make(9, 32, torch.float16, seed=3)
    weight[4] = 0
    weight[:, 7] = 0
    for field in ("input_sum_squares", "hessian", "fisher"):
        getattr(statistics, field).zero_()
    packed = get_pruner(name).prune(weight, statistics, NMPattern(3, 8))
    assert packed.kept().view(9, 4, 8).sum(2).eq(3).all()
    assert torch.isfinite(packed.values).all()


@pytest.mark.parametrize("name", [*DENSE, "sparsegpt"])
def test_leaves_the_weight_and_the_statistics_alone(name):
    weight, _, _, statistics = make(5, 16, torch.float32, seed=4)
    statistics.hessian[3] = statistics.hessian[:, 3] = 0
    before = [tensor.clone() for tensor in (weight, *vars(statistics).values()) if isinstance(tensor, torch.Tensor)]
    pruner = get_pruner(name)
    pruner.prune(weight, statistics, NMPattern(2, 4))
    pruner.scoring(weight, statistics)
    after = [tensor for tensor in (weight, *vars(statistics).values()) if isinstance(tensor, torch.Tensor)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", ["wanda", "ria", "fisher", "sparsegpt"])
def test_a_missing_or_misshapen_statistic_is_named(name):
    weight, _, _, statistics = make(5, 16, torch.float32, seed=5)
    pruner = get_pruner(name)
    (field,) = pruner.needs
    setattr(statistics, field, getattr(statistics, field)[:3])
    with pytest.raises(MspError, match=rf"h.0.fc: pruner '{name}': statistic '{field}' has shape \[3.*needed is \["):
        pruner.prune(weight, statistics, NMPattern(2, 4), name="h.0.fc")
    with pytest.raises(MspError, match=rf"h.0.fc: pruner '{name}' needs the statistic '{field}', which was not"):
        pruner.prune(weight, LinearStatistics(), NMPattern(2, 4), name="h.0.fc")
    with pytest.raises(MspError, match=rf"^pruner '{name}' needs the statistic '{field}'"):
        pruner.scoring(weight, LinearStatistics())


@pytest.mark.parametrize("name", [*DENSE, "sparsegpt"])
def test_what_does_not_fit_or_is_not_finite_names_the_linear(name):
    weight, _, _, statistics = make(5, 16, torch.float32, seed=6)
    with pytest.raises(MspError, match=r"h.0.fc: .*16"):
        get_pruner(name).prune(weight, statistics, NMPattern(2, 32), name="h.0.fc")
    weight[2, 3] = float("nan")
    with pytest.raises(MspError, match=r"h.0.fc: .*\b1\b.*NaN"):
        get_pruner(name).prune(weight, statistics, NMPattern(2, 4), name="h.0.fc")


@pytest.mark.parametrize("exponent", [-0.5, float("nan"), float("inf")])
def test_refuses_exponents_out_of_range(exponent):
    with pytest.raises(UsageError, match="exponent"):
        get_pruner("ria", exponent=exponent)
