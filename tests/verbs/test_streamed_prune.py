"""A model pruned with one block in memory is, bit for bit, the one pruned in memory."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, VOCABULARY, build, save, tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import msp
from msp.base.safetensors_files import read_headers, read_tensor, tensor_files
from msp.cli import app
from msp.errors import UsageError
from msp.formats.patterns import Allocation, NMPattern
from msp.models.stored import StoredBlock, load_stored
from msp.models.structure import Structure, find_structure
from msp.packed.checkpoint import PackedShards
from msp.packed.info import read_info, validate_packed
from msp.session import opened
from msp.text.token_sets import save_tokens

PATTERNS = ("0:8", "1:8", "2:4", "3:16", "5:8", "8:8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_tokens(torch.randint(0, VOCABULARY, (4096,)), path)
    return str(path)


def random_allocation(model: Any, path: Path) -> Path:
    """Any pattern for most linears, none for the others."""
    linears = [linear for linear in find_structure(model).linears if random.random() < 0.9]
    Allocation({linear.name: NMPattern.parse(random.choice(PATTERNS)) for linear in linears}).save(path)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    headers = read_headers(tensor_files(folder))
    return {name: read_tensor(headers, name) for name in headers}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize(
    ("family", "pruner", "dtype"),
    [
        ("gemma2", "wanda", torch.bfloat16),
        ("llama-tied", "sparsegpt", torch.float32),
        ("gpt2", "ria", torch.float32),
        ("falcon", "sparsegpt", torch.float32),
        ("llama", "magnitude", torch.float16),
    ],
)
def test_streamed_and_whole_give_the_same_model(
    family: str, pruner: str, dtype: torch.dtype, tmp_path: Path, text: str
) -> None:
    source = tmp_path / "dense"
    model = save(family, source, dtype=dtype)
    options = {**SMALL, "allocation": random_allocation(model, tmp_path / "a.json"), "calibration": text}
    options |= {"pruner": pruner, "test_tokens": 80}
    whole = msp.prune(source, output=tmp_path / "whole", **options)
    streamed = msp.prune(source, output=tmp_path / "streamed", stream=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "streamed"))
    for field in ("allocation", "skipped", "kl", "perplexity", "bytes", "density", "spent", "recipe"):
        assert getattr(streamed, field) == getattr(whole, field), field
    assert streamed.model is None and whole.kl > 0
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "streamed")]
    assert configs[0] == configs[1]
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "streamed")]
    assert names[0] - {"model.safetensors"} <= names[1]
    assert len(tensor_files(tmp_path / "streamed")) == len(find_structure(model).blocks) + 1

    validate_packed(tmp_path / "streamed")
    assert read_info(tmp_path / "streamed").packed_bytes == read_info(tmp_path / "whole").packed_bytes
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype=torch.float32)
    read = tokens(2, 8, seed=random.randrange(2**31))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)(read).logits
    assert torch.equal(loaded(read).logits, expected)


def test_a_streamed_search_is_pruned_like_one_in_memory(tmp_path: Path, text: str) -> None:
    save("qwen2", tmp_path / "dense")
    options = {**SMALL, "sparsity": 0.7, "calibration": text, "evaluations": 16}
    whole = msp.prune(tmp_path / "dense", output=tmp_path / "whole", **options)
    streamed = msp.prune(tmp_path / "dense", output=tmp_path / "streamed", stream=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "streamed"))
    assert (streamed.search_fitness, streamed.kl) == (whole.search_fitness, whole.kl)


def test_no_block_is_left_in_memory(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save("llama", tmp_path / "dense")
    structures: list[Structure] = []
    files: list[int] = []
    on, write = StoredBlock.on, PackedShards.write

    def loaded(*args: Any, **options: Any) -> Any:
        found = load_stored(*args, **options)
        structures.append(found[1])
        return found

    def alone(self: StoredBlock, device: torch.device) -> Any:
        for block in structures[0].blocks:
            assert all(tensor.is_meta for tensor in block.module.state_dict().values())
            assert all(linear.weight.is_meta for linear in block.linears)
        return on(self, device)

    def written(self: PackedShards, *args: Any) -> None:
        write(self, *args)
        files.append(len(list(self._folder.glob("*.safetensors"))))

    monkeypatch.setattr(opened, "load_stored", loaded)
    monkeypatch.setattr(StoredBlock, "on", alone)
    monkeypatch.setattr(PackedShards, "write", written)
    options = {**SMALL, "allocation": random_allocation(model, tmp_path / "a.json"), "calibration": text}
    msp.prune(tmp_path / "dense", output=tmp_path / "out", stream=True, **options)
    assert files == [1, 2], "a block is on disk before the next one comes"


def test_the_command_and_what_it_refuses(tmp_path: Path, text: str) -> None:
    model, out = save("llama", tmp_path / "dense"), tmp_path / "out"
    allocation = random_allocation(model, tmp_path / "a.json")
    asked = ["prune", str(tmp_path / "dense"), "-o", str(out), "--allocation", str(allocation), "--stream"]
    asked += ["--calibration", text, "--window", "16", "--calibration-tokens", "64", "--fitness-tokens", "64"]
    asked += ["--test-tokens", "64", "--pruner", "sparsegpt", "--device", "cpu", "--no-pictures", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["kl"] > 0 and validate_packed(out).linears
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    again = CliRunner().invoke(app, asked)
    assert again.exit_code != 0 and "exists already" in again.stderr
    with pytest.raises(UsageError, match="needs an output"):
        msp.prune(tmp_path / "absent", allocation=allocation, stream=True)
    with pytest.raises(UsageError, match="in memory"):
        msp.prune(build("llama"), output=tmp_path / "other", allocation=allocation, stream=True)


def test_a_failed_run_leaves_what_was_there(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = save("llama", tmp_path / "dense"), tmp_path / "out"
    options = {**SMALL, "allocation": random_allocation(model, tmp_path / "a.json"), "calibration": text}
    msp.prune(tmp_path / "dense", output=out, stream=True, **options)
    before = weights(out)
    write, written = PackedShards.write, []

    def fails(self: PackedShards, *args: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(write(self, *args))

    monkeypatch.setattr(PackedShards, "write", fails)
    with pytest.raises(msp.MspError, match=r"cannot be written.*No space left"):
        msp.prune(tmp_path / "dense", output=out, force=True, stream=True, **options, pruner="magnitude")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(msp.MspError, match=r"takes [\d,]+ bytes, and 1,000 are free"):
        msp.prune(tmp_path / "dense", output=out, force=True, stream=True, **options)
    assert same(before, weights(out)) and {path.name for path in tmp_path.iterdir()} == {"dense", "out", "a.json"}
