"""Weights that stay in 16 bits give what weights in fp32 give."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SMALL, UNUSUAL, build, save, tokens
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import msp
from msp import evaluate
from msp.evidence.fisher import fisher_traces
from msp.models import narrow
from msp.models.loading import load_model
from msp.models.narrow import NarrowConv1D, NarrowEmbedding, NarrowLinear, compute_in_fp32, computed_dtype, product
from msp.models.stored import load_stored
from msp.models.structure import find_structure
from msp.packed.sparse_linear import SparseLinear
from msp.text.token_sets import save_tokens

CPU = torch.device("cpu")
# One has linears of a class of its own, one changes its weights.
WIDE = {"falcon", "rwkv"}


def narrow_modules(model: nn.Module) -> int:
    return sum(type(module) in narrow.PLAIN for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_a_model_computes_what_it_computes_in_fp32(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(family, tmp_path, dtype=dtype)
    wide, held = load_model(tmp_path).model, load_model(tmp_path, narrow=True).model
    assert computed_dtype(held) == computed_dtype(wide) == torch.float32
    ids = tokens(2, 16, seed=1)
    with torch.no_grad():
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in (wide, held))
    assert torch.equal(found, expected)
    for name, parameter in held.named_parameters():
        assert torch.equal(parameter.float(), wide.get_parameter(name)), name
    dtypes = {linear.weight.dtype for linear in find_structure(held).linears}
    assert dtypes == {torch.float32 if family in WIDE else dtype}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_fisher_traces_are_the_same(family: str, tmp_path: Path) -> None:
    save(family, tmp_path, dtype=torch.bfloat16)
    found = []
    for held in (False, True):
        model = load_model(tmp_path, narrow=held).model
        found.append(fisher_traces(model, find_structure(model).linears, tokens(2, 16, seed=1)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 64, 40), (2, 33, 129)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_are_widened_a_few_at_a_time(
    shape: tuple[int, int, int], transposed: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, rows, columns = shape
    monkeypatch.setattr(narrow, "WIDENED_BYTES", 4 * columns * 6)
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    if transposed:
        weight = weight.t().contiguous().t()
    bias = torch.randn(rows) if biased else None
    x = torch.randn(batch, 4, columns, requires_grad=True)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight, bias), expected.float())
    weight.requires_grad_()
    found = product(x, weight, bias)
    torch.testing.assert_close(found, expected.float())
    grad = torch.randn_like(found)
    x_grad, weight_grad = torch.autograd.grad(found, (x, weight), grad)
    torch.testing.assert_close(x_grad, (grad.double() @ weight.double()).float())
    wide = torch.einsum("bti,btj->ij", grad.double(), x.detach().double())
    torch.testing.assert_close(weight_grad, wide.bfloat16())


def test_the_backward_keeps_no_wide_weight() -> None:
    weight, kept = torch.randn(64, 32, dtype=torch.bfloat16), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product(torch.randn(2, 32, requires_grad=True), weight)
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16]


def test_a_cast_model_is_a_plain_one(tmp_path: Path) -> None:
    save("gpt2", tmp_path, dtype=torch.float16)
    held = load_model(tmp_path, narrow=True).model
    assert {NarrowConv1D, NarrowEmbedding, NarrowLinear} <= {type(module) for module in held.modules()}
    for copied in (copy.deepcopy(held), pickle.loads(pickle.dumps(held)), held.to("cpu")):
        assert narrow_modules(copied)
        assert computed_dtype(copied) == torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = copy.deepcopy(held).to(dtype)
        assert not narrow_modules(cast)
        assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
        assert cast(input_ids=tokens(1, 8, seed=0)).logits.dtype == dtype
        assert {type(module) for module in cast.modules()} >= {Conv1D, nn.Embedding, nn.Linear}


class TakesWeights(nn.Module):
    """A model that multiplies by weights without calling their modules, or casts to their dtype."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embedding = nn.Embedding(96, 32)
        self.linear = nn.Linear(32, 96)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.embedding(input_ids)
        if self.how == "product":
            return type("Output", (), {"logits": hidden @ self.linear.weight.t()})
        if self.how == "cast":
            hidden = hidden + hidden.to(self.linear.weight.dtype)
        return type("Output", (), {"logits": self.linear(hidden)})


@pytest.mark.parametrize(("how", "stays"), [("call", True), ("product", False), ("cast", False)])
def test_weights_that_a_model_uses_by_itself_are_widened(how: str, stays: bool) -> None:
    with narrow.narrow_weights(torch.bfloat16), torch.device("meta"):
        model = TakesWeights(how)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    weight = model.linear.weight.detach().clone()
    assert weight.dtype == torch.bfloat16
    compute_in_fp32(model)
    assert narrow_modules(model) == (2 if stays else 0)
    assert model.linear.weight.dtype == (torch.bfloat16 if stays else torch.float32)
    assert torch.equal(model.linear.weight.float(), weight.float())
    assert model(tokens(1, 8, seed=0)).logits.dtype == torch.float32


def test_the_hook_goes_with_its_context() -> None:
    with narrow.narrow_weights(torch.bfloat16):
        assert nn.Linear(4, 4).weight.dtype == torch.float32  # not on the meta device
        assert nn.Linear(4, 4, device="meta").weight.dtype == torch.bfloat16
    assert nn.Linear(4, 4, device="meta").weight.dtype == torch.float32


def test_shared_weights_stay_one_weight() -> None:
    with narrow.narrow_weights(torch.bfloat16), torch.device("meta"):
        first, second = nn.Linear(4, 4), nn.Embedding(4, 4)
        second.weight = first.weight
    assert second.weight is first.weight
    assert first.weight.dtype == torch.bfloat16


def test_weights_in_fp32_are_made_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama-tied", tmp_path)
    monkeypatch.setattr("msp.models.loading.compute_in_fp32", lambda _: pytest.fail("nothing is narrow"))
    model = load_model(tmp_path, narrow=True).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parts_in_fp32_keep_all_of_a_model_in_fp32(tmp_path: Path) -> None:
    model = build("llama", dtype=torch.bfloat16)
    model.get_submodule("model.layers.0.mlp.up_proj").float()
    model.save_pretrained(tmp_path)
    held = load_model(tmp_path, narrow=True).model
    assert {parameter.dtype for parameter in held.parameters()} == {torch.float32}
    assert not narrow_modules(held)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_pruning_gives_the_bytes_that_fp32_weights_give(
    streamed: bool, pruner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    save_tokens(tokens(1, 4000, seed=1)[0], tmp_path / "tokens.safetensors")
    options: dict[str, Any] = {"sparsity": 0.5, "pruner": pruner, "evaluations": 8, "stream": streamed, **SMALL}
    options |= {"calibration": str(tmp_path / "tokens.safetensors")}
    if streamed:
        options["candidates"] = "ranks"
    held = msp.prune(tmp_path / "dense", output=tmp_path / "held", **options)
    monkeypatch.setattr(
        "msp.models.stored.narrow_dtype" if streamed else "msp.models.loading.narrow_dtype", lambda *_: None
    )
    wide = msp.prune(tmp_path / "dense", output=tmp_path / "wide", **options)
    assert (held.kl, held.perplexity, held.allocation) == (wide.kl, wide.perplexity, wide.allocation)
    assert held.search_fitness == wide.search_fitness
    files = [tmp_path / name for name in ("held", "wide")]
    first, second = ({file.name: file.read_bytes() for file in folder.glob("*.safetensors")} for folder in files)
    assert first == second


def test_a_packed_model_is_measured_with_narrow_weights(tmp_path: Path) -> None:
    save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    save_tokens(tokens(1, 4000, seed=1)[0], tmp_path / "tokens.safetensors")
    text = str(tmp_path / "tokens.safetensors")
    made = msp.prune(tmp_path / "dense", sparsity=0.5, output=tmp_path / "out", calibration=text, **SMALL)
    held = load_model(tmp_path / "out", dtype="float32", narrow=True).model
    assert {m.values.dtype for m in held.modules() if isinstance(m, SparseLinear)} == {torch.bfloat16}
    found = evaluate(
        tmp_path / "out", reference=tmp_path / "dense", evaluate=text, window=16, test_tokens=64, device="cpu"
    )
    assert found.dtype == "float32"
    assert made.model is not None
    again = evaluate(tmp_path / "out", evaluate=text, window=16, test_tokens=64, device="cpu")
    assert again.perplexity == found.perplexity


def test_a_streamed_block_is_the_pages_of_its_file(tmp_path: Path) -> None:
    save("llama", tmp_path, dtype=torch.bfloat16)
    loaded, structure = load_stored(tmp_path, device=CPU)
    with structure.blocks[0].on(CPU):
        dtypes = {linear.weight.dtype for linear in structure.blocks[0].linears}
    assert dtypes == {torch.bfloat16}
    assert computed_dtype(loaded.model) == torch.float32
