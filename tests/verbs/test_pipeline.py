"""From a dense model to a packed one, in every family, with every pruner and allocator."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SMALL, build, save, tokens
from transformers import AutoModelForCausalLM

import msp
from msp.allocators import allocator_names
from msp.errors import MspError, UsageError
from msp.formats.patterns import Allocation
from msp.models.structure import find_structure
from msp.ops import force_backend
from msp.packed.sparse_linear import SparseLinear
from msp.pruners import pruner_names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_predicts_what_the_masked_dense_one_does(family: str, tmp_path: Path, text: str) -> None:
    save(family, tmp_path / "dense")
    with force_backend("reference"):
        result = msp.prune(
            tmp_path / "dense",
            sparsity=0.6,
            output=tmp_path / "out",
            allocator="fisher-rank",
            calibration=text,
            **SMALL,
        )
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        masked = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        for linear in find_structure(masked).linears:
            module = loaded.get_submodule(linear.name)
            if isinstance(module, SparseLinear):
                linear.weight.copy_(module.packed.unpack())
        prompt = tokens(2, 9, seed=3)
        with torch.no_grad():
            expected, found = masked(input_ids=prompt).logits, loaded(input_ids=prompt).logits
            in_process = result.model(input_ids=prompt).logits
    if family == "falcon":  # its linears compute x @ W.t(), which may round differently
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)
    assert torch.equal(found, in_process)
    assert result.kept <= result.budget
    assert result.allocation.keys() | result.skipped.keys() >= {x.name for x in find_structure(masked).linears}


def test_experts_that_are_no_linears_are_listed(text: str) -> None:
    result = msp.prune(build("mixtral"), sparsity=0.5, allocator="uniform", calibration=text, **SMALL)
    assert any("experts" in name for name in result.skipped)
    assert result.skipped.pop("lm_head") == "the output head"
    assert all("not a linear" in reason for reason in result.skipped.values())


@pytest.mark.parametrize("pruner", pruner_names())
def test_every_pruner_prunes_to_the_allocation(pruner: str, llama: Path, text: str) -> None:
    result = msp.prune(llama, sparsity=0.75, allocator="fisher-rank", pruner=pruner, calibration=text, **SMALL)
    for name, pattern in result.allocation.items():
        module = result.model.get_submodule(name)
        assert isinstance(module, SparseLinear)
        assert module.pattern == pattern
        module.packed.check(name)
    assert result.kl > 0


@pytest.mark.parametrize("unit", ["linear", "block"])
@pytest.mark.parametrize("allocator", allocator_names())
def test_every_allocator_meets_the_budget(allocator: str, unit: str, llama: Path, text: str) -> None:
    options = {**SMALL, "evaluations": 32}
    result = msp.prune(llama, sparsity=0.7, allocator=allocator, unit=unit, calibration=text, **options)
    shapes = {linear.name: linear.shape for linear in find_structure(build("llama")).linears}
    total = sum(rows * columns for rows, columns in shapes.values())
    assert result.budget == int(0.3 * total)
    assert result.kept == result.allocation.kept(shapes) <= result.budget
    steps = [rows * columns // 8 for rows, columns in shapes.values()]
    smallest = min(steps) if unit == "linear" else sum(steps) // 2
    assert result.budget - result.kept < smallest
    if unit == "block":
        blocks = {name.split(".")[2]: str(pattern) for name, pattern in result.allocation.items()}
        assert {(n.split(".")[2], str(p)) for n, p in result.allocation.items()} == set(blocks.items())
    searches = allocator.startswith("msp") or allocator in ("evopress", "ramp-best")
    assert bool(result.history) == bool(result.recipe["search"]) == searches


@pytest.mark.parametrize("allocator", ["uniform", "fisher-knapsack", "msp"])
def test_a_budget_of_bytes_is_that_of_the_saved_model(allocator: str, llama: Path, text: str, tmp_path: Path) -> None:
    """What the tensors in the files take, whichever patterns and pins there are."""
    limit = 45_000
    options = {**SMALL, "evaluations": 32, "patterns": "0:8,1:8,2:8,3:16,4:8,8:8", "keep": "layers.0.*q_proj=5:16"}
    result = msp.prune(
        llama, budget_bytes=limit, allocator=allocator, calibration=text, output=tmp_path / "out", **options
    )
    info = msp.read_info(tmp_path / "out")
    stored = info.packed_bytes + info.other_bytes
    assert stored == result.spent == result.bytes["packed"] <= result.budget == limit
    # The smallest step is from 2:8 to 3:16 or the like, of a [16, 32] linear: less than a level of 8.
    assert limit - stored < 16 * 32 // 8 * 4
    assert str(result.allocation["model.layers.0.self_attn.q_proj"]) == "5:16"
    allowed = {"0:8", "1:8", "2:8", "3:16", "4:8", "8:8"}
    assert {str(p) for name, p in result.allocation.items() if not name.endswith("0.self_attn.q_proj")} <= allowed
    assert result.recipe["budget_bytes"] == limit and "sparsity" not in result.recipe


def test_the_result_is_plain_json(llama: Path, text: str) -> None:
    result = msp.prune(llama, sparsity=0.75, calibration=text, **SMALL, evaluations=16)
    data = json.loads(json.dumps(result.to_json()))
    assert set(data) >= {
        "density", "kept", "budget", "allocation", "skipped", "perplexity", "kl", "bytes", "seconds", "peak_memory",
    }  # fmt: skip
    assert Allocation.from_strings(data["allocation"]) == result.allocation
    assert data["bytes"]["packed"] < data["bytes"]["dense"]
    assert data["peak_memory"] > 2**20
    assert set(data["seconds"]) >= {"load", "allocate", "prune", "evaluate"}


def test_figures_are_those_of_the_packed_model(llama: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = msp.prune(llama, sparsity=0.75, output=out, allocator="uniform", calibration=text, **SMALL)
    # Held-out test windows are the first of the text.
    again = msp.evaluate(out, evaluate=text, reference=llama, window=16, test_tokens=64, device="cpu")
    assert again.dtype == "float32"
    assert again.perplexity == pytest.approx(result.perplexity["pruned"], rel=1e-6)
    assert again.kl == pytest.approx(result.kl, rel=1e-6)
    assert msp.evaluate(llama, evaluate=text, window=16, test_tokens=64).perplexity == pytest.approx(
        result.perplexity["dense"], rel=1e-6
    )


def test_half_precision_models_are_stored_as_they_came(tmp_path: Path, text: str) -> None:
    save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    result = msp.prune(
        tmp_path / "dense", sparsity=0.5, output=tmp_path / "out", pruner="sparsegpt", allocator="uniform",
        calibration=text, **SMALL,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name in result.allocation:
        kept = result.model.get_submodule(name).packed
        assert torch.equal(loaded.get_submodule(name).packed.values, kept.values)


@pytest.mark.parametrize("file", ["allocation.json", "recipe.yaml"])
def test_searching_then_pruning_is_pruning(file: str, llama: Path, text: str, tmp_path: Path) -> None:
    options = {"calibration": text, "seed": 2, **SMALL}
    alone = msp.prune(llama, sparsity=0.7, evaluations=32, **options)
    found = msp.search(llama, sparsity=0.7, evaluations=32, output=tmp_path / "found", **options)
    assert found.allocation == alone.allocation and found.history == alone.history
    assert (found.kept, found.budget, found.spent) == (alone.kept, alone.budget, alone.spent)
    assert found.recipe.items() <= alone.recipe.items()
    json.dumps(found.to_json())
    pruned = msp.prune(llama, allocation=tmp_path / "found" / file, **options)
    assert pruned.allocation == alone.allocation
    assert pruned.kl == alone.kl and pruned.kept == alone.kept == pruned.budget
    assert pruned.recipe["search"] is None and not pruned.history
    with pytest.raises(UsageError, match="nothing to search"):
        msp.search(llama, allocation=tmp_path / "found" / file, **options)


def test_an_interrupted_search_goes_on(llama: Path, text: str, tmp_path: Path) -> None:
    options = {"sparsity": 0.7, "calibration": text, "work_dir": tmp_path, **SMALL}
    whole = msp.prune(llama, evaluations=64, **{**options, "work_dir": None})
    msp.prune(llama, evaluations=32, **options)
    resumed = msp.prune(llama, evaluations=64, resume=True, **options)
    assert resumed.allocation == whole.allocation
    assert len(resumed.history) == len(whole.history) == 5
    with pytest.raises(MspError, match="another search"):
        msp.prune(llama, evaluations=64, resume=True, **{**options, "sparsity": 0.6})


def test_equal_seeds_give_equal_models(llama: Path, text: str) -> None:
    runs = [msp.prune(llama, sparsity=0.7, calibration=text, evaluations=32, seed=4, **SMALL) for _ in range(2)]
    assert runs[0].allocation == runs[1].allocation
    assert runs[0].kl == runs[1].kl


def test_linears_that_do_not_divide_stay_dense_and_the_rest_pays(text: str) -> None:
    model = build("llama")
    config = model.config
    config.intermediate_size = 68
    odd = AutoModelForCausalLM.from_config(config)
    result = msp.prune(odd, sparsity=0.5, allocator="ramp", calibration=text, **SMALL)
    assert result.skipped.pop("lm_head") == "the output head"
    assert set(result.skipped) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert all("68 input features" in reason for reason in result.skipped.values())
    assert result.density == pytest.approx(0.5, abs=0.01)
    with pytest.raises(UsageError, match="out of reach"):
        msp.prune(AutoModelForCausalLM.from_config(config), sparsity=0.9, calibration=text, **SMALL)


def test_comparisons_share_tokens_and_leave_the_model_dense(llama: Path, text: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = model(input_ids=tokens(1, 5, seed=0)).logits
    result = msp.compare(
        model,
        sparsity=0.75,
        allocators=["uniform", "msp"],
        pruners=["magnitude", "wanda"],
        seeds=[0, 1],
        calibration=text,
        evaluations=16,
        **SMALL,
    )
    assert torch.equal(model(input_ids=tokens(1, 5, seed=0)).logits, before)
    assert len(result.rows) == 2 * 2 * 2 + 4
    means = [row for row in result.rows if row.seed == "mean"]
    for mean in means:
        mine = [
            row for row in result.rows if (row.allocator, row.pruner) == (mean.allocator, mean.pruner) and row != mean
        ]
        assert mean.kl == pytest.approx(sum(row.kl for row in mine) / 2)
        assert mean.spread is not None and mean.spread["kl"] >= 0
        assert (mean.evaluations > 0) == (mean.tokens > 0) == (mean.allocator == "msp")
    for row in result.rows:
        if row.seed != "mean" and row.allocator == "msp":
            assert row.history[-1]["tokens"] == row.tokens
    # Magnitude with uniform levels asks nothing of the calibration tokens: seeds cannot matter.
    plain = next(row for row in means if (row.allocator, row.pruner) == ("uniform", "magnitude"))
    assert plain.spread == {"kl": 0.0, "perplexity": 0.0}
    json.dumps(result.to_json())


def test_sensitivities_cover_every_linear(llama: Path, text: str) -> None:
    result = msp.sensitivity(llama, calibration=text, window=16, calibration_tokens=64)
    assert set(result.traces) == {linear.name for linear in find_structure(build("llama")).linears}
    assert sum(result.blocks) == pytest.approx(sum(result.traces.values()))
    assert all(trace > 0 for trace in result.traces.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, "outside"),
        ({"sparsity": 1.0}, "outside"),
        ({"group_size": 6}, "4, 8, 16, 32"),
        ({"allocator": "best"}, "is not one of .*uniform"),
        ({"pruner": "axe"}, "wanda"),
        ({"unit": "model"}, "linear, block"),
        ({"fitness": "accuracy"}, "kl, perplexity"),
        ({"fitness_noise": 1.0}, r"fitness noise 1 is outside \[0, 1\)"),
        ({"evaluations": 0}, "at least one"),
        ({"search_tokens": 0}, "at least one"),
        ({"sparsity": None}, "one of them"),
        ({"budget_bytes": 10_000}, "one of them"),
        ({"sparsity": None, "budget_bytes": 100}, "budget of 100 bytes is out of reach"),
        ({"sparsity": None, "budget_bytes": "10MB"}, "more than the patterns keep"),
        ({"allocation": "x.json"}, "one of them"),
        ({"patterns": "2:8,2:9"}, "4, 8, 16, 32"),
        ({"keep": "nothing=2:8"}, "matches no linear"),
        ({"window": 4096}, "context"),
        ({"device": "abacus"}, "abacus"),
        ({"dtype": "int3"}, "int3"),
        ({"resume": True}, "work_dir"),
        ({"wibble": 1}, "wibble"),
    ],
)
def test_wrong_requests_are_refused_by_name(options: dict, message: str, llama: Path, text: str) -> None:
    with pytest.raises(UsageError, match=message):
        msp.prune(llama, **{"sparsity": 0.5, "calibration": text, **SMALL, **options})


def test_a_packed_model_is_not_pruned_again(llama: Path, text: str, tmp_path: Path) -> None:
    options = {"sparsity": 0.5, "allocator": "uniform", "calibration": text, **SMALL}
    msp.prune(llama, output=tmp_path / "out", **options)
    with pytest.raises(MspError, match="packed already"):
        msp.prune(tmp_path / "out", **options)
    with pytest.raises(MspError, match="exists"):
        msp.prune(llama, output=tmp_path / "out", **options)


def test_weights_that_are_not_numbers_are_named_before_any_work(text: str) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(MspError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of"):
        msp.prune(model, sparsity=0.5, calibration=text, **SMALL)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_model_and_its_reference_compute_in_one_dtype(dtype: str, tmp_path: Path, text: str) -> None:
    save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    options: dict[str, Any] = {"window": 16, "test_tokens": 64, "device": "cpu", "dtype": dtype}
    pruned = msp.prune(
        tmp_path / "dense",
        sparsity=0.5,
        output=tmp_path / "out",
        allocator="uniform",
        pruner="magnitude",
        calibration=text,
        evaluate=text,
        calibration_tokens=64,
        fitness_tokens=0,
        **options,
    )
    found = msp.evaluate(tmp_path / "out", reference=tmp_path / "dense", evaluate=text, **options)
    assert found.dtype == {"auto": "float32"}.get(dtype, dtype)
    # In bf16 a packed linear may add up in another order than the pruned one in memory did.
    assert found.kl == pytest.approx(pruned.kl, rel=1e-6 if dtype != "bfloat16" else 0.05)
    assert found.perplexity == pytest.approx(pruned.perplexity["pruned"], rel=1e-6 if dtype != "bfloat16" else 0.05)
    alone = msp.evaluate(tmp_path / "out", evaluate=text, **options)
    assert (alone.perplexity, alone.dtype) == (found.perplexity, found.dtype)


def test_a_reference_with_another_vocabulary_is_refused_before_it_is_loaded(
    tmp_path: Path, llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msp.verbs.evaluate.load_model", lambda *_, **__: pytest.fail("loaded"))
    config = FAMILIES["llama"]()
    config.vocab_size = 97
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(MspError, match="has another vocabulary than"):
        msp.evaluate(llama, reference=tmp_path, evaluate=text, window=16, test_tokens=64, device="cpu")
