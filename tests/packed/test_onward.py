"""Packed models in the hands of others: transformers without msp, pipelines, lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, llama_like, pack, packed_model, same_state, tokenizer, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from msp.base.safetensors_files import read_headers, split_guards, tensor_files
from msp.errors import MspError
from msp.models.as_loaded import FLOAT32
from msp.models.structure import find_structure
from msp.packed.auto_map import FILE, add_loader
from msp.packed.checkpoint import packed_shards, replace_linears, save_packed
from msp.packed.info import read_info, validate_packed
from msp.packed.sparse_linear import SparseLinear, guarded_state_dict

LM_EVAL = """
import sys
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

torch.set_num_threads(1)
assert "msp" not in sys.modules
measured = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", batch_size=1)
request = Instance("loglikelihood", {}, ("w5 w6 w7", " w8 w9"), 0)
((found, _),) = measured.loglikelihood([request], disable_tqdm=True)
print(found, any(type(module).__name__ == "SparseLinear" for module in measured.model.modules()))
"""
LABELS = ["from_pretrained", "dtype", "device_map", "pipeline", "body", "classifier", "no trust", "state dict"]
ALONE = """
import sys
import torch
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

torch.set_num_threads(1)
path = sys.argv[1]
load = AutoModelForCausalLM.from_pretrained
attempts = {
    "from_pretrained": lambda: load(path),
    "dtype": lambda: load(path, dtype=torch.bfloat16),
    "device_map": lambda: load(path, device_map="auto"),
    "pipeline": lambda: pipeline("text-generation", path),
    "body": lambda: AutoModel.from_pretrained(path),
    "classifier": lambda: AutoModelForSequenceClassification.from_pretrained(path, num_labels=3),
    "no trust": lambda: load(path, trust_remote_code=False),
    "state dict": lambda: load_model(
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)), path + "/model.safetensors"
    ),
}
for label, attempt in attempts.items():
    try:
        attempt()
        print(label, "| loaded")
    except Exception as error:
        print(label, "|", type(error).__name__)
assert "msp" not in sys.modules
"""
TRUSTED = """
import sys
import torch
from transformers import AutoModelForCausalLM, pipeline

torch.set_num_threads(1)
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, device_map="cpu")
assert type(model.config).__module__.startswith("transformers."), type(model.config)
assert not hasattr(model.config, "auto_map")
print(sum(type(module).__name__ == "SparseLinear" for module in model.modules()))
print(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item())
print(len(pipeline("text-generation", path, trust_remote_code=True)("w5 w6", max_new_tokens=3)))
"""


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def packed_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed models of families with nn.Linear, with Conv1D and with experts; not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    return {
        family: save_packed(packed_model(family), tokenizer(), folder / family, recipe={})
        for family in ("llama-tied", "gpt2", "mixtral")
    }


def alone(script: str, paths: list[Path], modules: Path) -> list[tuple[str, str]]:
    """What ``script`` prints and warns of for each path, in Pythons that can import msp but do not by themselves."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, path],
            env=environment,
            stdin=subprocess.DEVNULL,  # a question on the terminal is an error
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for path in paths
    ]
    found = [process.communicate(timeout=180) for process in processes]
    for process, (_, errors) in zip(processes, found, strict=True):
        assert process.returncode == 0, errors
    return found


def test_transformers_alone_refuses_a_packed_model(packed_dirs: dict[str, Path], tmp_path: Path) -> None:
    for output, errors in alone(ALONE, [packed_dirs["llama-tied"], packed_dirs["gpt2"]], tmp_path):
        outcomes = dict(line.split(" | ") for line in output.splitlines())
        assert list(outcomes) == LABELS
        assert set(outcomes.values()) <= {"RuntimeError", "ValueError"}, outcomes
        assert "weight" in errors and "MISMATCH" in errors


def test_trusted_code_loads_it_without_an_import(packed_dirs: dict[str, Path], tmp_path: Path) -> None:
    families = ["llama-tied", "gpt2"]
    paths = [packed_dirs[family] for family in families]
    for family, path, (output, _) in zip(families, paths, alone(TRUSTED, paths, tmp_path), strict=True):
        sparse, total, completions = output.split()
        assert int(sparse) == sum(not linear.pattern.is_dense for linear in read_info(path).linears)
        with torch.no_grad():
            expected = packed_model(family)(torch.tensor([[5, 6, 7]])).logits.double().sum().item()
        assert float(total) == pytest.approx(expected, rel=1e-5)
        assert int(completions) == 1


def test_lm_eval_measures_it(packed_dirs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    ((output, _),) = alone(LM_EVAL, [packed_dirs["llama-tied"]], tmp_path)
    found, packed = output.split()
    ids = torch.tensor([tokenizer()("w5 w6 w7 w8 w9").input_ids])
    with torch.no_grad():
        logprobs = packed_model("llama-tied")(ids).logits.log_softmax(-1)
    expected = sum(logprobs[0, at - 1, ids[0, at]].item() for at in (3, 4))
    assert float(found) == pytest.approx(expected, abs=1e-4) and packed == "True"


def test_guards_are_in_files_only(packed_dirs: dict[str, Path], tmp_path: Path) -> None:
    for family, path in packed_dirs.items():
        info, (stored, guards) = read_info(path), split_guards(read_headers(tensor_files(path)))
        assert guards.keys() == {f"{linear.name}.weight" for linear in info.linears if not linear.pattern.is_dense}
        model = AutoModelForCausalLM.from_pretrained(path)
        assert not guards.keys() & model.state_dict().keys()
        assert guards.keys() | model.state_dict().keys() == guarded_state_dict(model).keys()
        # nor do they count
        sizes = [header.shape for header in stored.values()]
        assert info.packed_bytes + info.other_bytes == sum(4 * size.numel() for size in map(torch.Size, sizes)) - sum(
            3 * torch.Size(header.shape).numel() for name, header in stored.items() if name.endswith(".bitmask")
        )
        # a state dict of the files is as good as one of the model
        empty = packed_model(family, seed=1)
        report = empty.load_state_dict(load_file(path / "model.safetensors"), strict=False)
        assert not report.unexpected_keys


def test_guards_are_not_reported_whichever_part_is_loaded(packed_dirs: dict[str, Path], tmp_path: Path) -> None:
    for family, path in packed_dirs.items():
        body, report = AutoModel.from_pretrained(path, output_loading_info=True)
        assert report["unexpected_keys"] <= {"lm_head.weight"} and not report["missing_keys"]
        body.save_pretrained(tmp_path / family)
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path / family, output_loading_info=True)
        assert report["missing_keys"] <= {"lm_head.weight"} and not report["unexpected_keys"]


def test_every_writer_puts_guards(tmp_path: Path) -> None:
    model = packed_model("llama", seed=1)
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    with packed_shards(tmp_path / "blocks", FLOAT32, 0) as shards:
        for block in find_structure(model).blocks:
            shards.write(block.module, f"{block.name}.")
        shards.finish(model, tokenizer(), {})
    for name in ("plain", "shards", "blocks"):
        files = tensor_files(tmp_path / name)
        assert len(files) > 1 or name == "plain"
        assert split_guards(read_headers(files))[1].keys() == expected
        validate_packed(tmp_path / name)
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values()), report


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_what_is_on_disk_runs_and_is_saved(packed_dirs: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        packed_dirs[family], device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert sparse and all(module.values.is_meta for module in sparse)
    whole, ids = AutoModelForCausalLM.from_pretrained(packed_dirs[family]), tokens(2, 9, 0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    validate_packed(tmp_path / "again")
    assert len(tensor_files(tmp_path / "again")) > 1
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), whole)


@pytest.mark.parametrize("patterns", [["2:8"], ["2:8", "8:8", "1:4"]])
def test_linears_that_published_files_merge(
    patterns: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files of this family hold q, k, v and a gate as one tensor; packed ones cannot, and a dense export does."""
    monkeypatch.setitem(FAMILIES, "hrm", llama_like("HrmTextConfig"))
    dense = build("hrm")
    dense.save_pretrained(tmp_path / "published")
    published = read_headers(tensor_files(tmp_path / "published"))
    assert any("gqkv_proj" in name for name in published)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    replace_linears(loaded, pack(loaded, patterns))
    expected = loaded.state_dict()
    for name, model in (("memory", packed_model("hrm", patterns=patterns)), ("loaded", loaded)):
        model.save_pretrained(tmp_path / name)
        validate_packed(tmp_path / name)
        found, report = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values()), report
        found.save_pretrained(tmp_path / f"{name}-again")
        validate_packed(tmp_path / f"{name}-again")
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
    dense_again = found.dequantize()
    dense_again.save_pretrained(tmp_path / "dense")
    stored = read_headers(tensor_files(tmp_path / "dense"))
    assert {name: header.shape for name, header in stored.items()} == {
        name: header.shape for name, header in published.items()
    }
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), dense_again)


def test_a_checkpoint_without_guards_loads_and_a_full_one_is_refused(
    packed_dirs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    for file in packed_dirs["llama-tied"].iterdir():
        (tmp_path / "old" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "old" / "model.safetensors"
    tensors = load_file(path)
    guards = [name for name, tensor in tensors.items() if tensor.shape == (0,)]
    assert guards
    save_file({name: tensor for name, tensor in tensors.items() if name not in guards}, path, metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(report.values())
    whole = AutoModelForCausalLM.from_pretrained(packed_dirs["llama-tied"])
    ids = tokens(1, 9, 0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    tensors[guards[0]] = torch.zeros(32, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    for load in (read_info, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(MspError, match=rf"{guards[0]}: shape \[32, 32\] beside packed tensors, needs \[0\]"):
            load(tmp_path / "old")


def test_the_file_that_imports_msp_stays_with_the_model_it_was_written_for(
    packed_dirs: dict[str, Path], tmp_path: Path
) -> None:
    path = packed_dirs["gpt2"]
    assert (path / FILE).is_file() and "AutoConfig" in json.loads((path / "config.json").read_text())["auto_map"]
    # what transformers saves again has no such file, so nothing names it there
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"auto_map": {"AutoConfig": "my.Config", "AutoModelForCausalLM": "my.Model"}}, False),
        ({"auto_map": {"AutoModelForCausalLM": "my.Model"}}, True),
        ({"model_type": "my_llama"}, False),
        ({}, True),
    ],
)
def test_a_model_with_code_of_its_own_keeps_it(changes: dict[str, Any], added: bool, tmp_path: Path) -> None:
    build("llama").config.save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    add_loader(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / FILE).is_file() == added
    auto_map = dict(found.get("auto_map", {}))
    if added:
        assert auto_map.pop("AutoConfig") == "load_with_msp.PackedConfig"
    assert auto_map == changes.get("auto_map", {})
    assert {**found, "auto_map": None} == {**config, "auto_map": None}
