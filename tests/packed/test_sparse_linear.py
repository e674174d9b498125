"""The module around a packed weight: what it computes, and that it survives what modules go through."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import msp
from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.formats.storage import Storage
from msp.ops import force_backend, nm_select
from msp.ops.linear import DENSE, ROWS, TILES, Layout, tiles
from msp.ops.linear.tile_order import from_tiles
from msp.packed.checkpoint import replace_linears
from msp.packed.sparse_linear import SparseLinear, find_linear, storages_of

PATTERNS = ["2:4", "1:8", "3:8", "0:8", "8:8", "5:16", "2:16", "0:4", "7:32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    pattern: str,
    columns: int = 96,
    rows: int = 7,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    packed = nm_select(weight, NMPattern.parse(pattern))
    return SparseLinear.from_packed(packed, torch.randn(rows, generator=generator).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_multiplies_by_the_unpacked_weight(pattern: str, dtype: torch.dtype) -> None:
    for shape, bias in (((96,), True), ((1, 96), False), ((5, 96), True), ((2, 3, 96), False), ((0, 96), True)):
        module = make(pattern, bias=bias, dtype=dtype, seed=len(shape))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        with force_backend("reference"):
            found = module(x)
        expected = nn.functional.linear(x, module.packed.unpack(), module.bias)
        assert found.shape == expected.shape and found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_are_those_of_the_format(pattern: str) -> None:
    module, parsed = make(pattern, columns=96, rows=5, dtype=torch.bfloat16), NMPattern.parse(pattern)
    assert module.values.nbytes == 5 * 96 // parsed.m * parsed.n * 2
    assert module.bitmask.nbytes == 5 * 96 // 8
    assert module.packed.nbytes == module.values.nbytes + module.bitmask.nbytes


@pytest.mark.parametrize(
    "columns, pattern", [(12, "1:4"), (44, "2:4"), (4, "0:4"), (4, "3:4"), (32, "0:32"), (64, "5:16")]
)
def test_a_new_module_is_valid_and_computes_its_bias(columns: int, pattern: str) -> None:
    module = SparseLinear(columns, 3, NMPattern.parse(pattern))
    module.packed.check("new")
    assert module.bitmask.shape == (3, math.ceil(columns / 8))
    nn.init.normal_(module.bias)
    assert torch.equal(module(torch.randn(2, columns)), module.bias.expand(2, 3))


def test_refuses_tokens_that_do_not_fit() -> None:
    module = make("2:8")
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, but the packed values are torch\.float32"):
        module(torch.randn(2, 96).bfloat16())
    with pytest.raises(ValueError, match=r"x has shape \[2, 88\], but its last dimension must be 96"):
        module(torch.randn(2, 88))
    with pytest.raises(ValueError, match="x is on meta"):
        module(torch.randn(2, 96, device="meta"))


def test_extra_repr_tells_sizes_pattern_and_bias() -> None:
    assert repr(make("2:8", bias=False)) == "SparseLinear(in_features=96, out_features=7, pattern=2:8, bias=False)"


def test_values_are_frozen_weight_and_the_bitmask_is_a_buffer() -> None:
    module = make("2:8")
    assert {name: p.requires_grad for name, p in module.named_parameters()} == {"values": False, "bias": False}
    assert [name for name, _ in module.named_buffers()] == ["bitmask"]
    assert list(module.state_dict()) == ["values", "bias", "bitmask"]


def test_shares_memory_with_what_it_was_made_from() -> None:
    packed = nm_select(torch.randn(4, 32), NMPattern(2, 8))
    module = SparseLinear.from_packed(packed)
    assert module.values.data_ptr() == packed.values.data_ptr() == module.packed.values.data_ptr()
    assert module.bitmask.data_ptr() == packed.bitmask.data_ptr()


def test_refuses_a_bias_of_another_length() -> None:
    with pytest.raises(MspError, match=r"\[5\].*4 output features"):
        SparseLinear.from_packed(nm_select(torch.randn(4, 32), NMPattern(2, 8)), torch.zeros(5))


def test_refuses_a_wrong_bitmask() -> None:
    packed = nm_select(torch.randn(4, 32), NMPattern(2, 8))
    packed.bitmask[2, 1] = 0b0000_0111
    with pytest.raises(MspError, match="row 2, group 1, which keeps 3"):
        SparseLinear.from_packed(packed)


def test_deepcopy_is_independent() -> None:
    module = make("3:8")
    twin = copy.deepcopy(module)
    x = torch.randn(2, 96)
    before = module(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.values.zero_()
        twin.bitmask.zero_()
    assert torch.equal(module(x), before)
    assert twin.pattern == module.pattern


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cast_converts_values_and_leaves_positions(dtype: torch.dtype) -> None:
    module = make("2:8")
    kept, values = module.packed.kept(), module.values.clone()
    module.to(dtype)
    assert module.values.dtype == module.bias.dtype == dtype and module.bitmask.dtype == torch.uint8
    assert torch.equal(module.values, values.to(dtype)) and torch.equal(module.packed.kept(), kept)
    assert module(torch.randn(3, 96, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("pattern", PATTERNS)
def test_state_dict_goes_into_a_new_module(pattern: str) -> None:
    module = make(pattern)
    other = SparseLinear(96, 7, NMPattern.parse(pattern))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.packed.unpack(), module.packed.unpack()) and torch.equal(other.bias, module.bias)


def test_meta_module_takes_a_state_dict_by_assignment() -> None:
    module = make("2:16")
    other = SparseLinear(96, 7, NMPattern(2, 16), device="meta", dtype=torch.bfloat16)
    assert other.values.is_meta and other.bitmask.is_meta and other.values.dtype == torch.bfloat16
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other.weight, module.packed.unpack())


@pytest.mark.parametrize("row, byte, wrong", [(0, 0, 0b0000_0111), (6, 11, 0), (3, 5, 0xFF)])
def test_a_state_dict_with_wrong_positions_is_refused_before_it_is_copied(row: int, byte: int, wrong: int) -> None:
    holder, other = nn.ModuleDict({"proj": make("2:8")}), make("2:8", seed=5)
    state = {f"proj.{name}": tensor.clone() for name, tensor in other.state_dict().items()}
    state["proj.bitmask"][row, byte] = wrong
    before = holder["proj"].packed.unpack()
    with pytest.raises(RuntimeError, match=r"proj"):
        holder.load_state_dict(state)
    assert torch.equal(holder["proj"].packed.unpack(), before)


def test_a_state_dict_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match="values"):
        make("2:8").load_state_dict(make("3:8").state_dict())


@pytest.mark.parametrize("pattern", ["2:8", "0:8", "3:4"])
@pytest.mark.parametrize("bias", [True, False])
def test_compiles_without_a_graph_break(pattern: str, bias: bool) -> None:
    torch._dynamo.reset()
    module = make(pattern, bias=bias)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (1, 3):
        x = torch.randn(tokens, 96)
        torch.testing.assert_close(compiled(x), module(x))


LAYOUTS = [("2:8", TILES), ("4:8", TILES), ("3:16", TILES), ("1:4", TILES), ("7:8", DENSE)]


def settled(pattern: str, layout: Layout, **options: Any) -> tuple[SparseLinear, SparseLinear]:
    """A module as it was made, and its copy in the layout that a CUDA device would give it."""
    module = make(pattern, 512, 32, dtype=torch.bfloat16, **options)
    other = copy.deepcopy(module)
    other._set_layout(layout)
    assert other.layout == layout and module.layout == ROWS
    return module, other


@pytest.mark.parametrize(("pattern", "layout"), LAYOUTS)
def test_a_layout_shows_neither_in_results_nor_in_what_is_saved(pattern: str, layout: Layout) -> None:
    module, other = settled(pattern, layout)
    assert not torch.equal(other.values.flatten()[:999], module.values.flatten()[:999])
    x = torch.randn(3, 512).bfloat16()
    with force_backend("reference"):
        assert torch.equal(other(x), module(x))
    assert torch.equal(other.weight, module.weight)
    other.packed.check("other")
    expected = module.state_dict()
    assert list(other.state_dict()) == list(expected)
    assert all(torch.equal(found, expected[name]) for name, found in other.state_dict().items())
    if layout == TILES:
        assert sum(part.nbytes for part in (other.values, other.bitmask)) == module.packed.nbytes


@pytest.mark.parametrize(("pattern", "layout"), LAYOUTS)
def test_a_layout_ends_where_the_module_is_cast_moved_or_loaded(pattern: str, layout: Layout) -> None:
    module, other = settled(pattern, layout)
    other.to(torch.float32)
    assert other.layout == ROWS and torch.equal(other.values, module.values.float())
    assert torch.equal(other.bitmask, module.bitmask)
    _, other = settled(pattern, layout)
    changed = make(pattern, 512, 32, dtype=torch.bfloat16, seed=9)
    other.load_state_dict(changed.state_dict())
    assert torch.equal(other.weight, changed.weight) and torch.equal(other.bias, changed.bias)


def test_gradients_pass_through_tiles() -> None:
    module, other = settled("2:8", TILES)
    x, upstream = torch.randn(3, 512).bfloat16(), torch.randn(3, 32).bfloat16()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for one, leaf in zip((module, other), inputs, strict=True):
        one.requires_grad_()
        with force_backend("reference"):
            one(leaf).backward(upstream)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert torch.equal(other.bias.grad, module.bias.grad)
    assert torch.equal(from_tiles(other.values.grad, other.bitmask)[0], module.values.grad)


def test_what_many_tokens_need_is_kept_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TILES), "serves", lambda *size: True)
    seen = []
    tiles_op = tiles.tiles_op

    def product(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[-1])
        result: torch.Tensor = tiles_op(*arguments)
        return result

    monkeypatch.setattr(tiles, "tiles_op", product)
    weight = torch.randn(32, 512).bfloat16()
    module = SparseLinear.from_packed(nm_select(weight, NMPattern(5, 8)))
    dense, x = module.weight, torch.randn(3, 512).bfloat16()
    model = nn.Sequential(module)
    assert msp.fast_prefill(model) == dense.nbytes
    with force_backend("reference"):
        model(x)
        assert torch.equal(seen[-1], dense) and "0.kept" not in model.state_dict()
        # it follows casts and loads, and what is trained goes without
        assert torch.equal(model.half()(x.half()), nn.functional.linear(x.half(), dense.half()))
        assert torch.equal(seen[-1], dense.half())
        other = SparseLinear.from_packed(nm_select(torch.randn(32, 512).half(), NMPattern(5, 8)))
        model.load_state_dict(nn.Sequential(other).state_dict())
        assert torch.equal(module.kept, other.weight)
        module.values.requires_grad_()
        model(x.half())
        assert seen[-1] is None
    monkeypatch.undo()
    assert msp.fast_prefill(model) == 0 and module.kept is None


class Attending(nn.Module):
    """Three linears of one input, two of another that are called at different times, one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 512, dtype=torch.bfloat16)
        rows = {"q": 32, "k": 16, "v": 16, "early": 512, "late": 512, "twice": 512}
        for at, (name, count) in enumerate(rows.items()):
            weight = torch.randn(count, 512).bfloat16() / 16
            self.add_module(name, SparseLinear.from_packed(nm_select(weight, NMPattern(1 + at, 8))))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        y = torch.cat([self.q(x), self.k(x), self.v(x)], -1).repeat(1, 1, 8)
        z = self.early(y)
        return self.twice(self.twice(z) + self.late(y))


@pytest.fixture
def attending() -> Attending:
    torch.manual_seed(0)
    model = Attending()
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module._set_layout(TILES)
    return model


def launches(compiled: Callable[..., Any], *inputs: torch.Tensor) -> list[str]:
    """Names of our ops that a model's graph has."""
    torch._dynamo.reset()
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        found.extend(str(node.target) for node in graph.graph.nodes if "msp." in str(node.target))
        return graph.forward

    torch.compile(compiled, backend=backend, fullgraph=True)(*inputs)
    return [name.split(".")[1] for name in found]


def test_linears_of_one_input_are_multiplied_in_one_launch(attending: Attending) -> None:
    ids = torch.tensor([[3]])
    with torch.no_grad(), force_backend("reference"):
        alone = [attending(ids), attending(ids.repeat(1, 2)), attending(ids.repeat(1, 3))]
        assert msp.fast_decode(attending) == 2
        assert attending.q.shared.linears == (attending.q, attending.k, attending.v)
        assert attending.early.shared is attending.twice.shared is None
        for count, expected in enumerate(alone, start=1):
            assert torch.equal(attending(ids.repeat(1, count)), expected)
        assert attending.q.shared.waiting is None
        names = launches(attending, ids)
    assert names == ["nm_linear_group"] + 4 * ["nm_linear_tiles"]
    with force_backend("reference"):  # gradients go the usual way
        names = launches(attending, ids)
    assert names == 7 * ["nm_linear_tiles"]


def test_linears_of_one_input_may_be_called_otherwise_too(attending: Attending) -> None:
    msp.fast_decode(attending)
    q, k, v = attending.q, attending.k, attending.v
    x, other = torch.randn(2, 1, 512).bfloat16()
    with torch.no_grad(), force_backend("reference"):
        expected = {linear: F.linear(x, linear.weight, linear.bias) for linear in (q, k, v)}
        q(x)
        assert torch.equal(v(other), F.linear(other, v.weight)) and torch.equal(v(x), expected[v])
        first = k(x)
        assert torch.equal(first, expected[k]) and k(x) is not first and torch.equal(k(x), expected[k])
        copied = copy.deepcopy(attending)
        assert copied.q.shared.linears[1] is copied.k
        k.float()
        assert q.shared is k.shared is v.shared is None and copied.q.shared is not None
        assert torch.equal(q(x), expected[q])


def test_an_input_that_is_changed_between_calls_is_shared_by_none(attending: Attending) -> None:
    class Changing(Attending):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            return self.q(x).repeat(1, 1, 16) + self.early(x.mul_(2))

    attending.__class__ = Changing
    assert msp.fast_decode(attending) == 0


@pytest.mark.parametrize(
    ("pattern", "compliant", "expected"), [("2:8", False, True), ("4:8", False, False), ("4:8", True, True)]
)
def test_knows_whether_sparse_tensor_cores_can_multiply(pattern: str, compliant: bool, expected: bool) -> None:
    weight = torch.randn(32, 512).bfloat16()
    module = SparseLinear.from_packed(nm_select(weight, NMPattern.parse(pattern), compliant=compliant))
    module._set_layout(TILES)
    assert module.compliant == expected


def test_is_compiled_in_tiles_too() -> None:
    _, other = settled("2:8", TILES)
    x = torch.randn(2, 512).bfloat16()
    with force_backend("reference"):
        torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="aot_eager")(x), other(x))


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    module = make("3:8", dtype=torch.bfloat16)
    layer = nn.Sequential(module, nn.ReLU())
    x = torch.randn(2, 3, 96).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_a_packed_llama_compiles_whole_and_generates_the_same() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None)).eval()
    linears = {name: linear for name, linear in model.model.named_modules() if isinstance(linear, nn.Linear)}
    patterns = [NMPattern(1 + index % 8, 8) for index in range(len(linears))]
    items = zip(linears.items(), patterns, strict=True)
    replace_linears(model, {f"model.{name}": nm_select(linear.weight.detach(), p) for (name, linear), p in items})
    ids = torch.randint(0, 64, (2, 5))

    def generate() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="static")

    with torch.no_grad():
        wanted, tokens = model(ids).logits, generate()
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(ids).logits, wanted)
        assert torch.equal(generate(), tokens)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 8)
        self.conv = Conv1D(16, 32)
        self.norm = nn.LayerNorm(32)


def test_replaces_linears_and_conv1ds_and_keeps_their_biases() -> None:
    model = Holder()
    nn.init.normal_(model.conv.bias)
    plain, conv = model.plain, model.conv
    packed = {
        "plain": nm_select(plain.weight.detach(), NMPattern(2, 8)),
        "conv": nm_select(conv.weight.detach().t(), NMPattern(1, 4)),
    }
    replace_linears(model, packed)
    x = torch.randn(3, 32)
    assert isinstance(model.plain, SparseLinear) and isinstance(model.conv, SparseLinear)
    assert (model.conv.out_features, model.conv.in_features) == (16, 32)
    torch.testing.assert_close(model.plain(x), nn.functional.linear(x, packed["plain"].unpack(), plain.bias))
    torch.testing.assert_close(model.conv(x), nn.functional.linear(x, packed["conv"].unpack(), conv.bias))


def test_a_pattern_that_keeps_all_leaves_the_module() -> None:
    model = Holder()
    plain = model.plain
    replace_linears(model, {"plain": nm_select(plain.weight.detach(), NMPattern(8, 8))})
    assert model.plain is plain
    assert storages_of(model) == {"plain": Storage(NMPattern(8, 8))}


@pytest.mark.parametrize(
    "name, columns, message",
    [
        ("nowhere.proj", 32, "nowhere.proj: Holder has no such linear"),
        ("norm", 32, "norm: a LayerNorm of Holder, not a linear"),
        ("plain", 64, r"plain: Holder has a weight of \[8, 32\] there, not \[8, 64\]"),
    ],
)
def test_one_wrong_name_or_shape_replaces_nothing(name: str, columns: int, message: str) -> None:
    model = Holder()
    packed = {
        "conv": nm_select(torch.randn(16, 32), NMPattern(2, 8)),
        name: nm_select(torch.randn(8, columns), NMPattern(2, 8)),
    }
    with pytest.raises(MspError, match=message):
        replace_linears(model, packed)
    assert isinstance(model.conv, Conv1D) and not storages_of(model)


def test_find_linear_sees_conv1d_transposed() -> None:
    model = Holder()
    assert find_linear(model, "conv", (16, 32)) is model.conv
    with pytest.raises(MspError, match=r"\[16, 32\] there, not \[32, 16\]"):
        find_linear(model, "conv", (32, 16))
