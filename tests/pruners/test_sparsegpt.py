from __future__ import annotations

import numpy as np
import pytest
import torch

from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.ops import nm_select
from msp.pruners import LinearStatistics, get_pruner
from msp.pruners.sparsegpt import inverse_cholesky

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FINE = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
CASES = [(1, 8, "2:4", 8), (9, 48, "1:4", 16), (17, 72, "3:8", 24), (6, 96, "6:16", 128), (7, 160, "2:8", 128)]


def make(rows, columns, dtype, seed, dead=(), tokens=None):
    """A weight and correlated inputs, fewer tokens than columns by default: the Hessian alone is singular."""
    torch.manual_seed(seed)
    tokens = tokens or columns // 2 + 3
    inputs = torch.randn(tokens, columns) @ (torch.randn(columns, columns) / columns**0.5 + torch.eye(columns))
    inputs = inputs * torch.randn(columns).exp()
    inputs[:, list(dead)] = 0
    statistics = LinearStatistics(tokens=tokens, hessian=(inputs.double().T @ inputs.double()).float())
    return torch.randn(rows, columns).to(dtype), inputs, statistics


def published(weight, hessian, tokens, n, m, block, percdamp=0.01, *, dead_count=False):
    """SparseGPT as published, from `add_batch`'s Hessian to the end of `fasterprune`, in float64.

    With `dead_count` the damping is the published one, to whose mean dead inputs add a 1; without, theirs is left out.
    """
    w, h = weight.double().numpy().copy(), 2 / tokens * hessian.double().numpy()
    rows, columns = w.shape
    dead = np.diag(h) == 0
    live = np.diag(h)[~dead]
    h[dead, dead] = 1
    w[:, dead] = 0
    mean = np.mean(np.diag(h)) if dead_count else np.mean(live)
    h[np.arange(columns), np.arange(columns)] += percdamp * mean
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    kept = np.ones((rows, columns), dtype=bool)
    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        error = np.zeros((rows, i2 - i1))
        for i in range(i1, i2):
            if (i - i1) % m == 0:
                saliency = w[:, i : i + m] ** 2 / np.diag(u)[i : i + m] ** 2
                smallest = np.argsort(saliency, axis=1, kind="stable")[:, : m - n]
                np.put_along_axis(kept[:, i : i + m], smallest, False, axis=1)
            q = np.where(kept[:, i], w[:, i], 0)
            error[:, i - i1] = (w[:, i] - q) / u[i, i]
            w[:, i:i2] -= np.outer(error[:, i - i1], u[i, i:i2])
            w[:, i] = q
        w[:, i2:] -= error @ u[i1:i2, i2:]
    return torch.from_numpy(w), torch.from_numpy(kept), torch.from_numpy(u)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_published_algorithm_in_float64(case, dtype):
    rows, columns, text, block = case
    pattern = NMPattern.parse(text)
    weight, _, statistics = make(rows, columns, dtype, seed=columns)
    want, kept, _ = published(weight, statistics.hessian, statistics.tokens, pattern.n, pattern.m, block)
    packed = get_pruner("sparsegpt", block_size=block).prune(weight, statistics, pattern)
    assert torch.equal(packed.kept(), kept)
    assert packed.dtype == dtype and packed.pattern == pattern
    tolerance = (1e-4 + FINE[dtype]) * want.abs() + 1e-4 * want.abs().mean()
    assert ((packed.unpack().double() - want).abs() <= tolerance).all()


@pytest.mark.parametrize("percdamp", [1e-4, 0.01, 1.0])
def test_the_damping_is_a_share_of_the_mean_diagonal(percdamp):
    weight, _, statistics = make(6, 40, torch.float32, seed=1, tokens=200)
    want, kept, _ = published(weight, statistics.hessian, 200, 2, 8, 128, percdamp)
    packed = get_pruner("sparsegpt", percdamp=percdamp).prune(weight, statistics, NMPattern(2, 8))
    assert torch.equal(packed.kept(), kept)
    torch.testing.assert_close(packed.unpack().double(), want, rtol=1e-4, atol=1e-4 * want.abs().mean().item())


def test_dead_inputs_lose_their_weights_and_disturb_no_other():
    weight, _, statistics = make(8, 32, torch.float32, seed=2, dead=(0, 9, 10, 11, 12, 13, 14, 31))
    want, _, _ = published(weight, statistics.hessian, statistics.tokens, 3, 8, 128)
    found = get_pruner("sparsegpt").prune(weight, statistics, NMPattern(3, 8)).unpack()
    assert not found[:, [0, 9, 10, 11, 12, 13, 14, 31]].any()
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4 * want.abs().mean().item())


def relu_inputs(seed, directions, noise, dead_share, columns=128, tokens=4096):
    """What enters a `fc2` of OPT: small, correlated activations behind a ReLU, some of which no token ever reaches."""
    torch.manual_seed(seed)
    mixing = torch.randn(directions, columns) / directions**0.5
    inputs = (0.1 * torch.randn(tokens, directions) @ mixing + noise * torch.randn(tokens, columns)).relu()
    inputs[:, torch.randperm(columns)[: round(dead_share * columns)]] = 0
    return inputs


# The bounds hold what chance does in the order of selection; more correlated inputs suffer more from the damping.
@pytest.mark.parametrize(
    ("directions", "noise", "dead_share", "bound"),
    [
        (8, 0.003, 0.1, 0.9),
        (16, 0.003, 0.1, 0.97),
        (32, 0.03, 0.5, 0.97),
        (32, 0.03, 0.1, 1.02),
        (32, 0.03, 0.02, 1.02),
    ],
)
def test_dead_inputs_of_a_relu_do_not_raise_the_damping(directions, noise, dead_share, bound):
    ours = theirs = 0.0
    for seed in range(3):
        seen, unseen = relu_inputs(seed, directions, noise, dead_share).split(2048)
        statistics = LinearStatistics(tokens=2048, hessian=seen.T @ seen)
        weight = torch.randn(64, 128)
        outputs = (weight @ unseen.T).square().sum()
        found = get_pruner("sparsegpt").prune(weight, statistics, NMPattern(4, 8)).unpack()
        other, _, _ = published(weight, statistics.hessian, 2048, 4, 8, 128, dead_count=True)
        ours += float(((found - weight) @ unseen.T).square().sum() / outputs)
        theirs += float(((other.float() - weight) @ unseen.T).square().sum() / outputs)
    assert ours < bound * theirs, (ours, theirs)


def factor_of(statistics):
    weight = torch.ones(1, len(statistics.hessian))
    return get_pruner("sparsegpt")._factor(weight, statistics, name="", warn=None)[0]


def test_without_dead_inputs_the_damping_is_the_published_one_to_the_last_bit():
    _, _, statistics = make(1, 48, torch.float32, seed=8)
    hessian = statistics.hessian.double() * (2.0 / statistics.tokens)
    diagonal = hessian.diagonal()
    diagonal.copy_(diagonal.clone() + 0.01 * diagonal.clone().mean())
    assert torch.equal(factor_of(statistics), inverse_cholesky(hessian))


def test_dead_inputs_change_nothing_about_the_others():
    _, _, statistics = make(1, 48, torch.float32, seed=9)
    dead = LinearStatistics(tokens=statistics.tokens, hessian=torch.zeros(64, 64))
    dead.hessian[:48, :48] = statistics.hessian
    torch.testing.assert_close(factor_of(dead)[:48, :48], factor_of(statistics), rtol=1e-10, atol=0)


def test_a_linear_all_of_whose_inputs_are_dead_becomes_zero():
    statistics = LinearStatistics(tokens=5, hessian=torch.zeros(16, 16))
    packed = get_pruner("sparsegpt").prune(torch.randn(3, 16), statistics, NMPattern(2, 8))
    assert not packed.unpack().any() and packed.kept().view(3, 2, 8).sum(2).eq(2).all()


def test_an_ill_conditioned_hessian_costs_no_digits():
    torch.manual_seed(3)
    columns = 64
    directions = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64)).Q
    hessian = (directions * torch.logspace(0, 9, columns, dtype=torch.float64)) @ directions.T
    statistics = LinearStatistics(tokens=columns, hessian=hessian.float())
    weight = torch.randn(5, columns)
    want, kept, _ = published(weight, statistics.hessian, columns, 4, 8, 128, percdamp=1e-5)
    packed = get_pruner("sparsegpt", percdamp=1e-5).prune(weight, statistics, NMPattern(4, 8))
    assert torch.equal(packed.kept(), kept)
    torch.testing.assert_close(packed.unpack().double(), want, rtol=1e-4, atol=1e-4 * want.abs().mean().item())


@pytest.mark.parametrize("seed", range(3))
def test_changes_the_output_less_than_leaving_the_kept_weights_alone(seed):
    torch.manual_seed(seed)
    weight = torch.randn(32, 64)
    inputs = torch.randn(256, 12) @ torch.randn(12, 64) + 0.3 * torch.randn(256, 64)
    statistics = LinearStatistics(tokens=256, hessian=inputs.T @ inputs)
    pruner = get_pruner("sparsegpt")
    updated = pruner.prune(weight, statistics, NMPattern(2, 8))
    alone = weight * updated.kept()
    magnitude = nm_select(weight, NMPattern(2, 8)).unpack()

    def damage(pruned):
        return ((pruned - weight) @ inputs.T).square().sum()

    assert damage(updated.unpack()) < 0.6 * damage(alone)
    assert damage(updated.unpack()) < 0.6 * damage(magnitude)


def test_scores_are_the_surgeons_before_any_update():
    weight, _, statistics = make(7, 48, torch.float32, seed=4, dead=(5,))
    _, _, u = published(weight, statistics.hessian, statistics.tokens, 2, 8, 128)
    scoring = get_pruner("sparsegpt").scoring(weight, statistics)
    assert list(scoring.kwargs()) == ["column_scale"]
    want = (u.T @ u).diagonal().rsqrt()
    want[5] = 0
    torch.testing.assert_close(scoring.column_scale, want.float(), rtol=1e-5, atol=0)


def indefinite(columns=24, smallest=-0.5):
    """A symmetric matrix with one negative eigenvalue, ``smallest`` times the mean of its diagonal."""
    torch.manual_seed(5)
    directions = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64)).Q
    values = torch.ones(columns, dtype=torch.float64)
    values[0] = 0
    values *= columns / (columns - 1 + smallest)
    values[0] = smallest * values.mean() * (columns - 1) / columns
    hessian = (directions * values) @ directions.T
    return LinearStatistics(tokens=2, hessian=hessian.float())


def test_damping_rises_tenfold_until_it_holds_and_says_so():
    weight, statistics = torch.randn(3, 24), indefinite()
    said = []
    packed = get_pruner("sparsegpt").prune(weight, statistics, NMPattern(2, 8), name="h.3.fc", warn=said.append)
    assert [message.split(" of its")[0] for message in said] == [
        "h.3.fc: the Hessian is not positive definite with damping 0.01",
        "h.3.fc: the Hessian is not positive definite with damping 0.1",
    ]
    want, kept, _ = published(weight, statistics.hessian, 2, 2, 8, 128, percdamp=1.0)
    assert torch.equal(packed.kept(), kept)
    torch.testing.assert_close(packed.unpack().double(), want, rtol=1e-4, atol=1e-4)


def test_a_singular_hessian_raises_a_damping_that_rounding_swallows():
    weight = torch.randn(3, 16)
    statistics = LinearStatistics(tokens=2, hessian=torch.ones(16, 16))
    said = []
    packed = get_pruner("sparsegpt", percdamp=1e-18, damping_raises=6).prune(
        weight, statistics, NMPattern(2, 8), name="h.0.fc", warn=said.append
    )
    assert 1 <= len(said) <= 6
    assert packed.kept().view(3, 2, 8).sum(2).eq(2).all()
    # one direction is all the inputs have, so the kept weights can take over the others' sum
    torch.testing.assert_close(packed.unpack().sum(1), weight.sum(1), rtol=1e-3, atol=1e-3)


def test_without_a_listener_it_is_a_python_warning():
    with pytest.warns(UserWarning, match=r"h\.3\.fc: .*damping 0.01"), pytest.warns(match=r"damping 0.1 "):
        get_pruner("sparsegpt").prune(torch.randn(3, 24), indefinite(), NMPattern(2, 8), name="h.3.fc")


def test_gives_up_in_the_end_with_no_other_hessian():
    said = []
    hopeless = indefinite(smallest=-15.0)
    with pytest.raises(MspError, match=r"h\.3\.fc: the Hessian is not positive definite, even with damping 10 of its"):
        get_pruner("sparsegpt").prune(torch.randn(3, 24), hopeless, NMPattern(2, 8), name="h.3.fc", warn=said.append)
    assert len(said) == 3


def test_refuses_a_hessian_of_nothing_or_of_no_numbers():
    weight, _, statistics = make(3, 16, torch.float32, seed=6)
    statistics.tokens = 0
    with pytest.raises(MspError, match=r"h\.0\.fc: pruner 'sparsegpt': the Hessian sums over 0 tokens"):
        get_pruner("sparsegpt").prune(weight, statistics, NMPattern(2, 8), name="h.0.fc")
    statistics.tokens = 5
    statistics.hessian[1, 2] = statistics.hessian[2, 1] = float("nan")
    with pytest.raises(MspError, match=r"h\.0\.fc: .* 2 of the Hessian's 256 entries are NaN or infinite"):
        get_pruner("sparsegpt").prune(weight, statistics, NMPattern(2, 8), name="h.0.fc")


@pytest.mark.parametrize(
    "options", [{"percdamp": 0.0}, {"percdamp": float("nan")}, {"block_size": 0}, {"damping_raises": -1}]
)
def test_refuses_options_out_of_range(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        get_pruner("sparsegpt", **options)
