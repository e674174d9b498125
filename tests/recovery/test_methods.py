"""What each method changes and leaves: masks, zeros, other tensors, and the first prediction."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from families import MIXED, build, tokens
from pairs import METHODS, pair, schedule, sparse, state, task

import msp.evidence.head
from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.models.as_loaded import StoredDtypes
from msp.models.structure import find_structure
from msp.ops import nm_select, quantise_values
from msp.packed.checkpoint import replace_linears
from msp.recovery import Distil, Phase, get_recovery
from msp.recovery.base import in_rows, training, vectors
from msp.recovery.training import recover

FAMILIES = ("llama", "llama-tied", "gpt2", "opt", "gemma2", "qwen3", "falcon", "mixtral")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_zeros_stay(family: str, method: str) -> None:
    """For patterns of every M, emptied linears, and linears that keep everything."""
    student, teacher = pair(family, MIXED)
    before, dense_before = state(student), state(teacher)
    zeros = {name: linear.weight == 0 for name, linear in sparse(student).items()}
    recovery = get_recovery(method)
    trained = set(recovery.parameters(student))
    found = recover(recovery, task(student, teacher), schedule())
    after = state(student)
    assert found.kept and found.after < found.before
    assert after.keys() == before.keys()
    for name, linear in sparse(student).items():
        assert torch.equal(after[f"{name}.bitmask"], before[f"{name}.bitmask"])
        # a kept value that was 0 may change; what the mask removes is 0
        assert not linear.weight[~linear.packed.kept()].any()
        assert zeros[name].shape == linear.weight.shape
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    aliases = {name: tensor.data_ptr() for name, tensor in student.state_dict().items()}
    of_trained = {aliases[name] for name in trained}
    assert changed and all(aliases[name] in of_trained for name in changed)
    assert {name: (each.dtype, each.shape) for name, each in after.items()} == {
        name: (each.dtype, each.shape) for name, each in before.items()
    }
    assert all(torch.equal(each, dense_before[name]) for name, each in teacher.state_dict().items())
    assert not any(each.requires_grad or each.grad is not None for each in student.parameters())


@pytest.mark.parametrize("seed", range(6))
def test_masks_stay_for_any_patterns(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice((4, 8, 16, 32)) for _ in range(14)]
    patterns = tuple(f"{draw.randint(0, m)}:{m}" for m in sizes)
    student, teacher = pair(draw.choice(FAMILIES), patterns, seed)
    before = state(student)
    found = recover(get_recovery(METHODS[seed % 3]), task(student, teacher), schedule(epochs=1))
    changed = {name for name, each in state(student).items() if not torch.equal(each, before[name])}
    assert bool(changed) == found.kept
    assert not {name for name in changed if name.endswith("bitmask")}
    for linear in sparse(student).values():
        linear.packed.check()
        assert not linear.weight[~linear.packed.kept()].any()


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_large_vocabulary_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a few tokens at a time, computed again in the backward."""
    found = []
    for large in (False, True):
        if large:
            monkeypatch.setitem(msp.evidence.head.PIECE_BYTES, "cpu", 5 * 96 * 4)
            monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 96)
        student, teacher = pair(family)
        found.append(recover(Distil(), task(student, teacher), schedule()))
    (whole,), (pieces,) = (each.phases for each in found)
    assert pieces.before == pytest.approx(whole.before, rel=1e-5)
    for one, other in zip(whole.losses, pieces.losses, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-3)
    assert found[1].after == pytest.approx(found[0].after, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_starts_from_the_pruned_model(family: str, method: str) -> None:
    student, teacher = pair(family, MIXED)
    windows = tokens(3, 16, 9)
    with torch.inference_mode():
        expected = student(input_ids=windows).logits
    recovery = get_recovery(method)
    with in_rows(student), training(student, recovery.parameters(student)):
        assert torch.equal(student(input_ids=windows).logits, expected)
        phases = recovery.phases(task(student, teacher))
        assert math.isfinite(next(phases).measure())
        phases.close()
    with torch.inference_mode():
        assert torch.equal(student(input_ids=windows).logits, expected)


def test_what_each_method_trains() -> None:
    student, _ = pair("llama-tied", ("2:8", "8:8", "0:8"))
    names = {method: set(get_recovery(method).parameters(student)) for method in METHODS}
    every = {name for name, _ in student.named_parameters()}
    assert names["norms"] == {name for name in every if "norm" in name or name.endswith("bias")}
    # the values of an emptied linear are no numbers; embeddings, which are the head too, stay
    empty = {f"{name}.values" for name, linear in sparse(student).items() if linear.pattern.n == 0}
    assert empty
    assert names["distil"] == every - empty - {"model.embed_tokens.weight"}
    assert names["blockwise"] == {name for name in names["distil"] if ".layers." in name}
    dense = {name for name in names["distil"] if name.endswith("proj.weight")}
    assert dense == {
        f"{name}.weight" for name, each in student.named_modules() if str(getattr(each, "pattern", "")) == "8:8"
    }


def test_dropout_is_off() -> None:
    """GPT-2 has dropout: with it, two equal forwards of the training would differ."""
    student, teacher = pair("gpt2")
    assert student.config.resid_pdrop > 0
    student.train()
    phase = next(iter(Distil().phases(task(student.eval(), teacher))))
    assert float(phase.loss(0)) == float(phase.loss(0))


@pytest.mark.parametrize("method", METHODS)
def test_without_a_gain_the_start_is_kept(method: str) -> None:
    student, teacher = pair("llama")
    before = state(student)
    found = recover(get_recovery(method), task(student, teacher), schedule(learning_rate=30.0))
    assert not found.kept and found.after == found.before
    assert all(torch.equal(each, before[name]) for name, each in state(student).items())
    for phase in found.phases:
        assert (phase.step, phase.after) == (0, phase.before) or phase.after < phase.before


def test_a_training_that_overflows_keeps_the_start() -> None:
    student, teacher = pair("llama")
    before = state(student)
    found = recover(Distil(), task(student, teacher), schedule(learning_rate=1e30))
    assert not math.isfinite(found.phases[0].history[-1].loss)
    assert not found.kept
    assert all(torch.equal(each, before[name]) for name, each in state(student).items())


@pytest.mark.parametrize("method", METHODS)
def test_the_best_is_kept_as_it_is_stored(method: str) -> None:
    """In bf16: the losses are those of the rounded values, and these are what the model then has."""
    student, teacher = pair("llama")
    dtypes = StoredDtypes({}, torch.bfloat16, 0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(parameter.bfloat16())
    job = task(student, teacher, stored=dtypes)
    recovery = get_recovery(method)
    found = recover(recovery, job, schedule(measurements=6))
    assert found.kept
    assert all(torch.equal(each, each.bfloat16().float()) for each in recovery.parameters(student).values())
    assert found.after == job.held_out_loss()
    for phase in found.phases:
        assert phase.after == min(each.loss for each in phase.history)
        assert phase.after == next(each.loss for each in phase.history if each.step == phase.step)
    if len(found.phases) == 1:
        assert found.after == found.phases[0].after


def test_blocks_learn_the_states_of_the_dense_model() -> None:
    """The loss of the first block is its squared error, over the mean square of the dense states."""
    student, teacher = pair("llama")
    job = task(student, teacher)
    states: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        layer = model.get_submodule("model.layers.0")
        handle = layer.register_forward_hook(
            lambda _, __, output, name=name: states[name].append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            for windows in (job.batches[3], *job.held_out):
                model(input_ids=windows)
        handle.remove()
    (one, *ours), (other, *theirs) = states["student"], states["teacher"]
    scale = torch.cat(theirs).double().square().mean()
    phases = get_recovery("blockwise").phases(job)
    first = next(phases)
    assert float(first.loss(3)) == pytest.approx(float((one - other).double().square().mean() / scale), rel=1e-5)
    error = (torch.cat(ours) - torch.cat(theirs)).double().square().mean()
    assert first.measure() == pytest.approx(float(error / scale), rel=1e-6)
    phases.close()
    assert type(student.get_submodule("model.layers.0")).__name__ == "LlamaDecoderLayer"


def test_states_go_to_files() -> None:
    results = []
    for limit in (1 << 30, 3000):
        student, teacher = pair("gpt2")
        found = recover(get_recovery("blockwise"), task(student, teacher, hidden_bytes=limit), schedule())
        results.append((found, state(student)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(each, results[1][1][name]) for name, each in results[0][1].items())


def test_blockwise_refuses_blocks_that_do_not_run_alone() -> None:
    student, teacher = pair("hrm")
    with pytest.raises(MspError, match=r"more than once: choose another method"):
        recover(get_recovery("blockwise"), task(student, teacher), schedule())
    assert recover(get_recovery("distil"), task(student, teacher), schedule()).kept


def test_accumulated_gradients_are_those_of_a_larger_batch() -> None:
    """AdamW sees the mean of both forwards, so that one forward of twice the windows gives the same steps."""
    found = []
    for together, accumulate in ((2, 2), (4, 1)):
        student, teacher = pair("llama")
        batches = torch.split(tokens(4, 16, 1), together)  # one step an epoch: the order does not count
        recover(Distil(), task(student, teacher, batches=batches), schedule(4, accumulate))
        found.append(state(student))
    for name, each in found[0].items():
        torch.testing.assert_close(each, found[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_method_of_ones_own() -> None:
    """It trains what it likes beside the model, and merges it."""

    @dataclass(frozen=True)
    class Shift:
        name: ClassVar[str] = "shift"
        learning_rate: float = 0.05

        def parameters(self, model: Any) -> Any:
            return vectors(model)

        def phases(self, task: Any) -> Any:
            kept = {"shift": torch.nn.Parameter(torch.zeros(1))}
            shifts.append(kept["shift"])
            yield Phase(
                "Shifting", kept, lambda _: (kept["shift"] - 1).square().sum(), lambda: (kept["shift"].item() - 1) ** 2
            )

        def merge(self, model: Any) -> None:
            merged.append(shifts[0].item())

    shifts: list[torch.nn.Parameter] = []
    merged: list[float] = []
    student, teacher = pair("llama")
    found = recover(get_recovery(Shift()), task(student, teacher), schedule(learning_rate=0.05))
    assert found.phases[0].after < 0.9 * found.phases[0].before
    assert merged == [shifts[0].item()] and not found.kept


def test_names_and_options() -> None:
    assert get_recovery("distil", learning_rate=0.5) == Distil(0.5)
    with pytest.raises(UsageError, match="recovery method 'lora' is not one of blockwise, distil, norms"):
        get_recovery("lora")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="learning rate"):
            get_recovery("norms", learning_rate=rate)


def test_values_that_are_coded_are_not_trained() -> None:
    model = build("llama")
    linears = {
        linear.name: nm_select(linear.weight.contiguous(), NMPattern(2, 8)) for linear in find_structure(model).linears
    }
    replace_linears(model, {name: quantise_values(each, "int8/32") for name, each in linears.items()})
    assert set(get_recovery("distil").parameters(model)) == {n for n, _ in model.named_parameters() if "norm" in n}
