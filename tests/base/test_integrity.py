"""No packed model loads with other weights than it was saved with, and none is saved that is not finite."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from families import SMALL, build, packed_model, same_state, save, save_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import msp
from msp import evaluate
from msp.base import hashes
from msp.base.finite import check_figures, is_finite
from msp.base.hashes import Hashing, data_places, hash_bytes, hash_tensor
from msp.base.safetensors_files import read_headers, tensor_files
from msp.errors import MspError
from msp.evidence.evaluate import DenseReference
from msp.models.loading import load_model
from msp.packed.checkpoint import save_packed
from msp.packed.info import read_manifest, validate_packed
from msp.packed.sparse_linear import SparseLinear


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrity") / "packed"
    save_packed(packed_model("llama-tied", seed=1), None, folder, recipe={})
    return folder


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def with_tensor(path: Path, name: str, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def copied(packed_dir: Path, path: Path) -> Path:
    path.mkdir()
    for file in packed_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_every_stored_tensor_has_its_hash(packed_dir: Path) -> None:
    tensors = load_file(packed_dir / "model.safetensors")
    found = read_manifest(packed_dir).hashes
    assert found == {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bitmask"} <= found.keys()


def test_the_hash_is_of_dtype_shape_and_bytes() -> None:
    data = memoryview(bytes(range(8)))
    distinct = [("F32", (2,)), ("I32", (2,)), ("F32", (2, 1)), ("F32", (1, 2)), ("BF16", (4,)), ("F16", (4,))]
    assert len({hash_bytes(dtype, shape, data) for dtype, shape in distinct}) == len(distinct)
    assert hash_bytes("F32", (2,), data) == xxhash.xxh3_64(b"F32[2]" + bytes(range(8))).hexdigest()
    strided = torch.randn(4, 6).t()
    assert hash_tensor(strided) == hash_tensor(strided.contiguous()) != hash_tensor(strided.t().contiguous())
    assert hash_tensor(torch.empty(3, device="meta")) is None


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_no_mutation_of_the_weights_passes(
    packed_dir: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated"
    if not path.exists():
        copied(packed_dir, path)
    choose, data = random.Random(seed), bytearray((packed_dir / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(choose.choice((1, 1, 4))):
        at = choose.randrange(header) if choose.random() < 0.3 else choose.randrange(len(data))
        data[at] ^= 1 << choose.randrange(8)
    (path / "model.safetensors").write_bytes(data)
    try:
        validate_packed(path)
    except MspError:
        return
    # what passes differs from what was saved in nothing that is loaded, such as the metadata
    one, other = load_file(path / "model.safetensors"), load_file(packed_dir / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.values"]
)
def test_a_changed_tensor_is_named_by_all_that_read_it(name: str, packed_dir: Path, tmp_path: Path) -> None:
    path = copied(packed_dir, tmp_path / "changed")
    with_tensor(path, name, lambda tensor: tensor * 1.0001)
    for read in (load, load_model, validate_packed):
        with pytest.raises(MspError, match=rf"{name} is damaged: its hash is [0-9a-f]{{16}}, and config.json has"):
            read(path)


def test_positions_that_moved_are_noticed(packed_dir: Path, tmp_path: Path) -> None:
    path = copied(packed_dir, tmp_path / "moved")
    with_tensor(path, "model.layers.0.self_attn.q_proj.bitmask", lambda bitmask: bitmask.roll(1, 0).contiguous())
    with pytest.raises(MspError, match="bitmask is damaged"):
        load(path)


def test_another_dtype_of_the_same_bytes_is_noticed(packed_dir: Path, tmp_path: Path) -> None:
    path = copied(packed_dir, tmp_path / "viewed")
    with_tensor(path, "model.norm.weight", lambda tensor: tensor.view(torch.int32))
    with pytest.raises(MspError):
        load(path)


def test_the_check_can_be_left_out(packed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(packed_dir, tmp_path / "changed")
    with_tensor(path, "model.norm.weight", lambda tensor: tensor * 2)
    monkeypatch.setenv("MSP_VERIFY", "0")
    load(path)
    with pytest.raises(MspError, match="damaged"):
        validate_packed(path)


def test_a_model_without_hashes_loads_with_one_note(packed_dir: Path, tmp_path: Path) -> None:
    path = copied(packed_dir, tmp_path / "old")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["hashes"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="has no hashes"):
        model = load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(path)
        load(packed_dir)
    with_tensor(path, "model.norm.weight", lambda tensor: torch.full_like(tensor, torch.nan))
    with pytest.raises(MspError, match=r"model\.norm\.weight: 32 of its 32 values are NaN or infinite"):
        load(path)
    assert same_state(model, load(packed_dir))


@pytest.mark.parametrize("how", ["missing", "no hexadecimal", "other"])
def test_hashes_that_do_not_fit_are_refused(how: str, packed_dir: Path, tmp_path: Path) -> None:
    path = copied(packed_dir, tmp_path / how)
    config = json.loads((path / "config.json").read_text())
    found = config["quantization_config"]["hashes"]
    if how == "missing":
        del found["model.norm.weight"]
    else:
        found["model.norm.weight"] = "x" * 16 if how == "no hexadecimal" else "0" * 16
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MspError, match=r"model\.norm\.weight"):
        load(path)


@pytest.mark.parametrize("shard", ["5GB", "9KB"])
def test_what_transformers_saves_again_has_new_hashes(shard: str, packed_dir: Path, tmp_path: Path) -> None:
    model = load(packed_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
        for module in model.modules():
            if isinstance(module, SparseLinear):
                module.values.mul_(0.5)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    old, new = read_manifest(packed_dir).hashes, read_manifest(tmp_path / "again").hashes
    stored = read_headers(tensor_files(tmp_path / "again"))
    assert new == Hashing(stored).result()
    assert old["model.norm.weight"] != new["model.norm.weight"]
    assert old["model.embed_tokens.weight"] == new["model.embed_tokens.weight"]
    assert same_state(load(tmp_path / "again"), model)
    validate_packed(tmp_path / "again")


def test_a_model_that_training_broke_is_saved_without_hashes_and_not_loaded(packed_dir: Path, tmp_path: Path) -> None:
    model = load(packed_dir)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    assert not read_manifest(tmp_path / "broken").hashes
    with pytest.raises(MspError, match=r"model\.norm\.weight: 1 of its 32 values"):
        load(tmp_path / "broken")


def test_a_tensor_that_is_gone_is_named(packed_dir: Path, tmp_path: Path) -> None:
    """Its hash is there still. A packed linear's guard may go."""
    folder = copied(packed_dir, tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    guard = next(name for name, tensor in tensors.items() if not tensor.numel())
    del tensors[guard]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    validate_packed(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MspError, match=r"model\.norm\.weight is missing"):
        validate_packed(folder)


def test_sharding_makes_no_difference(packed_dir: Path, tmp_path: Path) -> None:
    save_packed(load(packed_dir), None, tmp_path / "sharded", recipe={}, max_shard_size="9KB")
    assert len(tensor_files(tmp_path / "sharded")) > 1
    assert read_manifest(tmp_path / "sharded").hashes == read_manifest(packed_dir).hashes


def test_a_write_that_goes_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory has other hashes than what is on disk."""
    model = packed_model("llama", seed=2)
    monkeypatch.setattr(hashes, "hash_tensor", lambda tensor: "0" * 16)
    with pytest.raises(MspError, match="is damaged"):
        save_packed(model, None, tmp_path / "out", recipe={})
    assert not (tmp_path / "out").exists()


def test_places_are_those_of_safetensors(packed_dir: Path) -> None:
    file = packed_dir / "model.safetensors"
    data, tensors = file.read_bytes(), load_file(file)
    for name, (start, stop) in data_places(file).items():
        expected = tensors[name].reshape(-1)
        assert data[start:stop] == (expected.view(torch.uint8).numpy().tobytes() if expected.numel() else b"")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_value_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for size in (1, 7, 64, 1000):
        tensor = torch.randn(size).to(dtype)
        assert is_finite(tensor) and is_finite(torch.full((size,), torch.finfo(dtype).max, dtype=dtype))
        for at in {0, size // 2, size - 1}:
            broken = tensor.clone()
            broken[at] = value
            assert not is_finite(broken)
    assert is_finite(torch.zeros(0)) and is_finite(torch.zeros(3, dtype=torch.int64))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with NaN in its last norm."""
    folder = tmp_path_factory.mktemp("broken")
    save("llama", folder)
    with_tensor(folder, "model.norm.weight", lambda tensor: tensor.index_fill(0, torch.tensor(3), torch.nan))
    save_text(folder / "text.txt", 0)
    return folder


@pytest.mark.parametrize("stream", [False, True])
def test_nan_outside_the_linears_is_refused(stream: bool, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(MspError, match=r"model\.norm\.weight: 1 of its 32 values are NaN or infinite"):
        prune(broken, broken / "text.txt", tmp_path / "out", stream=stream)
    assert not (tmp_path / "out").exists()


def prune(model: Any, text: Path, out: Path, **options: Any) -> Any:
    small = {**SMALL, "calibration": str(text), "evaluate": str(text), "allocator": "uniform"}
    return msp.prune(model, sparsity=0.5, output=out, **{**small, **options})


def test_nan_in_an_object_is_refused(broken: Path, tmp_path: Path) -> None:
    from families import tokenizer

    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] = torch.nan
    with pytest.raises(MspError, match=r"model\.embed_tokens\.weight: 1 of its"):
        prune(model, broken / "text.txt", tmp_path / "out", tokenizer=tokenizer())


@pytest.mark.parametrize("stream", [False, True])
def test_a_dtype_that_overflows_says_which_would_not(stream: bool, tmp_path: Path) -> None:
    save("llama", tmp_path / "m")
    save_text(tmp_path / "text.txt", 0)
    with_tensor(tmp_path / "m", "model.norm.weight", lambda tensor: tensor.index_fill(0, torch.tensor(3), 1e5))
    with pytest.raises(
        MspError, match=r"model\.norm\.weight: 1 of its 32 values overflow in float16: take bfloat16 or"
    ):
        prune(tmp_path / "m", tmp_path / "text.txt", tmp_path / "out", dtype="float16", stream=stream)
    load_model(tmp_path / "m", dtype="bfloat16")


def test_the_block_that_overflows_first_is_named(tmp_path: Path) -> None:
    save("llama", tmp_path / "m")
    save_text(tmp_path / "text.txt", 0)
    name = "model.layers.1.post_attention_layernorm.weight"
    with_tensor(tmp_path / "m", name, lambda tensor: torch.full_like(tensor, 3e4))
    with pytest.raises(
        MspError, match=r"output of model\.layers\.1 is not finite in float16: take bfloat16 or float32"
    ):
        prune(tmp_path / "m", tmp_path / "text.txt", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MspError, match=r"model\.layers\.1"):
        evaluate(tmp_path / "m", evaluate=str(tmp_path / "text.txt"), window=16, test_tokens=64, dtype="float16")


def test_a_pruned_model_whose_figures_are_not_finite_is_not_saved(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path / "m")
    total = DenseReference.total

    def not_finite(self: DenseReference, *args: Any, **options: Any) -> Any:
        sums = total(self, *args, **options)
        sums.divergence = torch.nan
        return sums

    monkeypatch.setattr(DenseReference, "total", not_finite)
    with pytest.raises(MspError, match="KL is nan"):
        prune(tmp_path / "m", broken / "text.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_figures_that_are_finite_cost_no_forward() -> None:
    check_figures({"perplexity": 3.0}, None, torch.zeros(1, 4))
