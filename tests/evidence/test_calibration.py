"""Streaming block by block sees what the whole model would see, in every family."""

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, build
from torch import nn

from msp.errors import MspError
from msp.evidence.calibration import BlockStream, gather, stream_statistics
from msp.models.gates import GatedModel
from msp.models.structure import Structure, find_structure

NEEDS = frozenset({"input_sum_squares", "hessian"})


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param).eval()


def random_windows(model: nn.Module, sequences: int = 5, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(torch.seed())
    return torch.randint(0, model.config.get_text_config().vocab_size, (sequences, length), generator=generator)


def whole_model_statistics(model: nn.Module, structure: Structure, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in structure.linears}

    def hook_for(name: str):
        return lambda module, args: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]).double())

    hooks = [linear.module.register_forward_pre_hook(hook_for(linear.name)) for linear in structure.linears]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in inputs.items() if parts}


def test_statistics_equal_those_of_a_whole_forward(model: nn.Module) -> None:
    structure, windows = find_structure(model), random_windows(model)
    expected = whole_model_statistics(model, structure, windows)
    streamed = {}
    for _, statistics in stream_statistics(model, structure, windows, NEEDS, batch_size=2):
        streamed.update(statistics)
    assert streamed.keys() == {linear.name for linear in structure.linears}
    for name, x in expected.items():
        assert streamed[name].tokens == len(x)
        torch.testing.assert_close(streamed[name].input_sum_squares.double(), x.square().sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(streamed[name].hessian.double(), x.t() @ x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("statistic", ["input_sum_squares", "hessian"])
def test_sums_that_overflow_name_their_linear(statistic: str) -> None:
    model = build("llama").eval()
    structure = find_structure(model)
    with torch.no_grad():
        model.get_parameter("model.layers.0.post_attention_layernorm.weight").fill_(1e25)
    with pytest.raises(MspError, match=r"layers\.0\.mlp\.\w+: \d+ of \d+ sums over its inputs are NaN or infinite"):
        list(stream_statistics(model, structure, random_windows(model), frozenset({statistic})))


def test_later_blocks_see_what_pruned_ones_give_them(model: nn.Module) -> None:
    structure, windows = find_structure(model), random_windows(model)
    streamed = {}
    for block, statistics in stream_statistics(model, structure, windows, NEEDS, sequential=True):
        streamed.update(statistics)
        if block.index == 0:
            for linear in block.linears:
                linear.module.weight.data.mul_(0.5)
    expected = whole_model_statistics(model, structure, windows)
    for linear in structure.linears:
        if linear.block > 0 and linear.name in expected:
            found = streamed[linear.name].input_sum_squares.double()
            torch.testing.assert_close(found, expected[linear.name].square().sum(0), rtol=1e-4, atol=1e-5)


def test_the_model_is_whole_again_afterwards(model: nn.Module) -> None:
    structure, windows = find_structure(model), random_windows(model)
    before = model(input_ids=windows).logits
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(RuntimeError, match="on purpose"):
        for block, _ in stream_statistics(model, structure, windows, NEEDS):
            if block.index == 1:
                raise RuntimeError("on purpose")
    assert [name for name, _ in model.named_modules()] == names
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=windows).logits, before)


def drain(iterator: Iterator[None]) -> None:
    for _ in iterator:
        pass


def test_blocks_run_in_order_only() -> None:
    model = build("llama").eval()
    structure = find_structure(model)
    with GatedModel(model, structure) as gates:
        stream = BlockStream(gates, random_windows(model))
        drain(stream.run(0, advance=False))
        with pytest.raises(AssertionError, match="runs before"):
            drain(stream.run(1, advance=False))


def test_only_what_is_asked_for_is_gathered() -> None:
    model = build("llama").eval()
    linears = find_structure(model).linears
    with gather(linears, frozenset()) as statistics:
        model(input_ids=random_windows(model))
    entry = statistics[linears[0].name]
    assert entry.tokens == 60 and entry.hessian is None and entry.input_sum_squares is None
