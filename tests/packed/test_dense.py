"""From packed back to dense: in memory, and as files that need no msp."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SMALL, build, pack, packed_model, same_state, save, tokenizer, tokens
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging
from typer.testing import CliRunner

import msp
from msp.base.safetensors_files import read_headers, tensor_files
from msp.cli import app
from msp.errors import MspError
from msp.models.loading import load_model
from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.dense import export_dense
from msp.packed.info import read_info
from msp.packed.sparse_linear import SparseLinear, storages_of


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


def masked(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dense model that ``packed_model(family, seed)`` computes the same as."""
    model = build(family, seed, dtype)
    pack(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_the_masked_dense_model(family: str, tmp_path: Path) -> None:
    expected = masked(family)
    save_packed(packed_model(family), None, tmp_path / "out", recipe={})
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), packed_model(family)):
        assert model.dequantize() is model
        assert same_state(model, expected)
        kinds = {name: type(module) for name, module in expected.named_modules() if "Linear" in type(module).__name__}
        for name, module in expected.named_modules():
            if isinstance(module, Conv1D):
                assert type(model.get_submodule(name)) is Conv1D
            elif name in kinds:
                assert isinstance(model.get_submodule(name), nn.Linear)
        assert not storages_of(model) and not model.is_quantized and not hasattr(model, "hf_quantizer")
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
        assert not any(report.values()) and same_state(again, expected)


def test_dequantize_keeps_dtypes_or_takes_one() -> None:
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = packed_model("llama-tied")
        model.config.dtype = torch.float16  # of the files, which the model in memory need not follow
        model.dequantize(dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model(tokens(1, 5, 0)).logits.dtype == expected


def test_a_pruned_model_is_dequantized(llama: Path, text: str) -> None:
    result = msp.prune(
        str(llama), sparsity=0.5, allocator="uniform", pruner="magnitude", calibration=text, evaluate=text, **SMALL
    )
    before = {name: module.weight for name, module in result.model.named_modules() if isinstance(module, SparseLinear)}
    model = result.model.dequantize()
    assert before
    for name, weight in before.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert (weight == 0).float().mean() >= 0.5


def test_a_module_and_a_weight_in_two_places_stay_one() -> None:
    model = packed_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    second.self_attn.q_proj = copy.copy(first.self_attn.q_proj)  # another module with the same weight
    second.self_attn.q_proj._parameters = dict(first.self_attn.q_proj._parameters)
    with torch.no_grad():
        before = model(tokens(1, 5, 0)).logits
        model.dequantize()
        torch.testing.assert_close(model(tokens(1, 5, 0)).logits, before)
    assert type(first.mlp.up_proj) is nn.Linear and second.mlp.up_proj is first.mlp.up_proj
    assert second.self_attn.q_proj is not first.self_attn.q_proj
    assert second.self_attn.q_proj.weight is first.self_attn.q_proj.weight


def test_what_is_not_in_memory_is_not_unpacked(tmp_path: Path) -> None:
    path = save_packed(packed_model("llama"), None, tmp_path / "out", recipe={})
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=tmp_path / "offload")
    kept = len([module for module in model.modules() if isinstance(module, SparseLinear)])
    with pytest.raises(MspError, match=r"model\.layers\.1\.self_attn\.q_proj: its weights are offloaded"):
        model.dequantize()
    assert len([module for module in model.modules() if isinstance(module, SparseLinear)]) == kept
    assert model.is_quantized


LOADS_ALONE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(AutoTokenizer.from_pretrained(sys.argv[1])("w5 w6 w7", return_tensors="pt").input_ids).logits.sum().item())
assert "msp" not in sys.modules
"""


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "packed"
    model = build("mixtral", 1, torch.bfloat16)
    replace_linears(model, pack(model))
    save_packed(model, tokenizer(), folder, recipe={"model": "some/model", "kl": 0.5})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "pictures").mkdir()
    (folder / ".cache").mkdir()
    return folder


def test_an_export_is_a_plain_model(packed_dir: Path, tmp_path: Path) -> None:
    expected = masked("mixtral", 1, torch.bfloat16)
    assert msp.export_dense(packed_dir, tmp_path / "dense", max_shard_size="60KB") == tmp_path / "dense"
    files = {file.name for file in (tmp_path / "dense").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates", "README.md"} <= files
    assert not files & {"load_with_msp.py", "pictures", ".cache"} and len(tensor_files(tmp_path / "dense")) > 1
    expected.save_pretrained(tmp_path / "expected")
    stored, wanted = (
        {name: (header.shape, header.dtype) for name, header in read_headers(tensor_files(tmp_path / name)).items()}
        for name in ("dense", "expected")
    )
    assert stored == wanted  # experts under the names that the architecture is published with
    loaded = load_model(tmp_path / "dense", dtype="bfloat16")
    assert same_state(loaded.model, expected)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "import msp" not in card and "some/model" in card and "KL to the dense model" in card
    done = subprocess.run(
        [sys.executable, "-c", LOADS_ALONE, tmp_path / "dense"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ids = AutoTokenizer.from_pretrained(packed_dir)("w5 w6 w7", return_tensors="pt").input_ids
    assert float(done.stdout) == pytest.approx(expected(ids).logits.sum().item(), rel=1e-2)


def test_the_verb(packed_dir: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    done = run(packed_dir, "--dense", "-o", tmp_path / "dense", "--json")
    assert done.exit_code == 0, done.stderr
    found, info = json.loads(done.stdout), read_info(packed_dir)
    assert found["bytes"] == {
        "packed": info.packed_bytes + info.other_bytes,
        "dense": info.dense_bytes + info.other_bytes,
    }
    assert found["linears"] == sum(not linear.pattern.is_dense for linear in info.linears)
    again = run(packed_dir, "--dense", "-o", tmp_path / "dense")
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert run(packed_dir, "--dense", "-o", tmp_path / "dense", "--force").exit_code == 0


def test_what_cannot_be_exported(packed_dir: Path, tmp_path: Path) -> None:
    save("llama", tmp_path / "dense")
    with pytest.raises(MspError, match="is not a packed model"):
        export_dense(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(MspError, match="is the packed model itself"):
        export_dense(packed_dir, packed_dir, force=True)
    (tmp_path / "damaged").mkdir()
    for file in packed_dir.iterdir():
        if file.is_file():
            (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes()[:5000])
    with pytest.raises(MspError):
        export_dense(tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    done = CliRunner().invoke(app, ["export", str(packed_dir), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "--dense" in done.stderr
