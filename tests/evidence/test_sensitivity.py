from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, build, tokens
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from msp.errors import MspError, UsageError
from msp.evidence import fisher as sensitivity
from msp.evidence.fisher import fisher_diagonals, fisher_traces
from msp.models.structure import Linear, find_structure
from msp.ops import force_backend


class Toy(nn.Module):
    """Uses linears in the ways that are hard to see through; each way has its name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.changed_in_place = nn.Linear(8, 8)
        self.called_twice = nn.Linear(8, 8)
        self.second_call_unused = nn.Linear(8, 8)
        self.never_called = nn.Linear(8, 8)
        self.flattened = Conv1D(8, 8)
        self.some_tokens = nn.Linear(8, 8)
        self.no_tokens = nn.Linear(8, 8)
        self.of_positions = nn.Linear(6, 8)
        self.without_effect = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)
        self.register_buffer("positions", torch.linspace(-1, 1, 60).view(10, 6))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        hidden *= 1.5
        hidden = self.changed_in_place(hidden).sigmoid_() + hidden
        hidden = self.called_twice(torch.tanh(self.called_twice(hidden))) + hidden
        self.second_call_unused(2 * hidden)
        hidden = hidden + self.second_call_unused(hidden)
        batch, length, width = hidden.shape
        flat = self.flattened(torch.sin(hidden).view(-1, width))
        chosen = input_ids.flatten() % 2 == 0
        flat = flat.index_add(0, chosen.nonzero().squeeze(1), self.some_tokens(flat[chosen]))
        flat = flat + self.no_tokens(flat[:0]).sum()
        hidden = torch.tanh(flat.view(batch, length, width)) + self.of_positions(self.positions[:length]).mul_(2)
        self.without_effect(hidden)
        return SimpleNamespace(logits=self.head(hidden))


TOY_LINEARS = [name for name, module in Toy().named_children() if isinstance(module, (nn.Linear, Conv1D))]


def toy(seed=0, names=TOY_LINEARS):
    torch.manual_seed(seed)
    model = Toy()
    return model, [Linear(name, name, 0, getattr(model, name)) for name in names]


def expected(model, linears, windows):
    """Squared gradients by plain autograd in float64, a sequence at a time, oriented [out, in]."""
    model = copy.deepcopy(model).double().eval()
    model.requires_grad_(True)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    totals = {linear.name: torch.zeros(linear.shape, dtype=torch.float64) for linear in linears}
    for window in windows:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        functional.cross_entropy(logits[:-1].double(), window[1:]).backward()
        for linear in linears:
            gradient = model.get_submodule(linear.name).weight.grad
            if gradient is not None:
                totals[linear.name] += (gradient.t() if linear.transposed else gradient) ** 2 / len(windows)
    return totals


def check(model, linears, windows, rtol):
    want = expected(model, linears, windows)
    traces = fisher_traces(model, linears, windows)
    diagonals = fisher_diagonals(model, linears, windows)
    assert list(traces) == list(diagonals) == [linear.name for linear in linears]
    for name, diagonal in want.items():
        assert traces[name] == pytest.approx(diagonal.sum().item(), rel=rtol), name
        found = diagonals[name]
        assert found.dtype == torch.float32 and found.device.type == "cpu" and found.shape == diagonal.shape
        scale = diagonal.mean().item()
        assert ((found - diagonal).abs() <= rtol * (diagonal + scale)).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_per_sequence_autograd(family):
    model = build(family)
    linears = find_structure(model).linears
    check(model, linears, tokens(3, 13, seed=len(family)), rtol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("length", [3, 40])  # 40 is past where the Gram form is the cheaper one
def test_equals_it_closely_when_the_model_is_float64(family, length):
    model = build(family, seed=1, dtype=torch.float64)
    check(model, find_structure(model).linears, tokens(2, length, seed=length), rtol=1e-5)


@pytest.mark.parametrize(("length", "seed"), [(2, 0), (9, 1), (10, 2)])
def test_sees_every_use_of_a_linear(length, seed):
    model, linears = toy(seed)
    windows = tokens(4, length, seed, vocabulary=20)
    check(model, linears, windows, rtol=1e-4)
    traces = fisher_traces(model, linears, windows)
    untouched = {name for name, trace in traces.items() if trace == 0}
    assert untouched == {"never_called", "no_tokens", "without_effect"}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.15), (torch.float16, 0.03)], ids=str)
def test_half_precision_neither_underflows_nor_drifts(dtype, rtol):
    model, linears = toy(seed=5)
    with torch.no_grad():
        model.head.weight /= 64  # small gradients everywhere before the head
    windows = tokens(3, 10, seed=5, vocabulary=20)
    want = fisher_traces(model, linears, windows)
    found = fisher_traces(model.to(dtype), linears, windows)
    for name, trace in want.items():
        assert found[name] == pytest.approx(trace, rel=rtol), name


def test_one_squared_gradient_per_sequence_not_per_batch():
    model, linears = toy(seed=2)
    windows = tokens(5, 8, seed=2, vocabulary=20)
    together = fisher_diagonals(model, linears, windows)
    single = [fisher_diagonals(model, linears, window[None]) for window in windows]
    for name, diagonal in together.items():
        mean = torch.stack([one[name] for one in single]).mean(0)
        torch.testing.assert_close(diagonal, mean, rtol=1e-5, atol=1e-9)


def hooks_of(model):
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for name, module in model.named_modules()
    }


def state_of(model):
    return (
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        hooks_of(model),
    )


def unusual_model():
    """Some parameters frozen, some modules in training, a gradient and a hook already there."""
    model = build("gpt2", seed=3)
    model.transformer.h[0].train()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    model.transformer.ln_f.weight.grad = torch.ones_like(model.transformer.ln_f.weight)
    model.transformer.h[1].register_forward_hook(lambda *call: None)
    return model


@pytest.mark.parametrize("measure", [fisher_traces, fisher_diagonals])
def test_leaves_the_model_as_it_was(measure):
    model = unusual_model()
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    measure(model, find_structure(model).linears, tokens(2, 6, seed=0))
    assert state_of(model) == before
    for name, parameter in model.named_parameters():
        if name == "transformer.ln_f.weight":
            assert torch.equal(parameter.grad, torch.ones_like(parameter))
        else:
            assert parameter.grad is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward", "progress"])
def test_leaves_the_model_as_it_was_when_something_fails(where, monkeypatch):
    model = unusual_model()
    before = state_of(model)

    def fail(*arguments, **options):
        raise Stop

    if where == "forward":
        monkeypatch.setattr(model.transformer.h[1], "forward", fail)
    if where == "backward":
        monkeypatch.setattr(sensitivity.ops, "fisher_trace", fail)
    with pytest.raises(Stop):
        fisher_traces(model, find_structure(model).linears, tokens(2, 6, seed=0), progress=fail)
    assert state_of(model) == before


def test_hooks_only_the_linears_it_is_given_and_reports_progress():
    model = build("llama")
    before = hooks_of(model)
    some = [linear for linear in find_structure(model).linears if linear.kind == "mlp.down_proj"]
    seen = []

    def progress(done, total):
        changed = {name for name, count in hooks_of(model).items() if count != before[name]}
        assert changed == {"model.embed_tokens", *(linear.name for linear in some)}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        seen.append((done, total))

    windows = tokens(3, 6, seed=4)
    traces = fisher_traces(model, some, windows, progress=progress)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    every = fisher_traces(model, find_structure(model).linears, windows)
    assert traces == {linear.name: every[linear.name] for linear in some}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(mode):
    model, linears = toy()
    windows = tokens(2, 7, seed=1, vocabulary=20)
    want = fisher_traces(model, linears, windows)
    with mode():
        assert fisher_traces(model, linears, windows + 0) == want


def test_a_forced_backend_reaches_the_ops():
    model, linears = toy()
    with force_backend("cuda"), pytest.raises(UsageError, match="fisher_trace: backend 'cuda' was forced"):
        fisher_traces(model, linears, tokens(1, 7, seed=1, vocabulary=20))


def test_an_input_overwritten_before_the_backward_is_an_error():
    model, _ = toy()

    def forward(input_ids, use_cache):
        hidden = model.embed(input_ids)
        out = model.changed_in_place(hidden)
        hidden.add_(1)
        return SimpleNamespace(logits=model.head(out))

    model.forward = forward
    linears = [Linear("changed_in_place", "", 0, model.changed_in_place)]
    with pytest.raises(MspError, match="changed_in_place: the model overwrote this linear's input"):
        fisher_traces(model, linears, tokens(1, 7, seed=1, vocabulary=20))


def test_names_what_is_not_finite():
    model, linears = toy()
    windows = tokens(2, 7, seed=1, vocabulary=20)

    def forward(input_ids, use_cache):
        hidden = model.called_twice(model.embed(input_ids))
        # the root's slope at 0 is infinite, the loss is not
        return SimpleNamespace(logits=model.head((hidden - hidden.detach()).sqrt()))

    model.forward = forward
    linears = [linear for linear in linears if linear.name == "called_twice"]
    with pytest.raises(MspError, match=r"called_twice: fisher_trace: 56 of the 56 values of g are NaN or infinite"):
        fisher_traces(model, linears, windows)
    with torch.no_grad():
        model.called_twice.weight.fill_(float("nan"))
    with pytest.raises(MspError, match="sequence 0: the loss is nan"):
        fisher_traces(model, linears, windows)


@pytest.mark.parametrize(
    "windows", [torch.ones(4, dtype=torch.long), torch.ones(2, 1, dtype=torch.long), torch.ones(0, 8), torch.ones(2, 8)]
)
def test_refuses_windows_that_are_none(windows):
    model, linears = toy()
    with pytest.raises(UsageError, match="windows must be integer token ids"):
        fisher_traces(model, linears, windows)


def test_a_model_without_embeddings_is_an_error():
    with pytest.raises(MspError, match="Linear does not say which module embeds"):
        fisher_traces(nn.Linear(3, 3), [], torch.ones(1, 4, dtype=torch.long))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_on_a_gpu_accumulators_may_stay_there_or_not(share, monkeypatch):
    monkeypatch.setattr(sensitivity, "RESIDENT_SHARE", share)
    model = build("llama")
    linears = find_structure(model).linears
    windows = tokens(2, 12, seed=0)
    want = fisher_diagonals(model, linears, windows)
    found = fisher_diagonals(model.cuda(), linears, windows)
    for name, diagonal in want.items():
        torch.testing.assert_close(found[name], diagonal, rtol=1e-3, atol=1e-3 * diagonal.mean().item())
