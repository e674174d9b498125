"""Python code that comes with a model is run if the user says so, and never otherwise."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, save, tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import msp
from msp import evaluate, measure, search, sensitivity
from msp.cli import app
from msp.errors import MspError
from msp.models.loading import load_model
from msp.models.stored import load_stored
from msp.text.token_sets import save_tokens

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .names import TYPE

(Path(__file__).parent / "ran").touch()
Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = TYPE


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        # super() and a global of the module: what a worker that gets the class must get too
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * len(TYPE) / 7
        return found


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of an architecture that transformers does not have; its code leaves ``tmp_path/ran`` when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of the folder of another test
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = tmp_path / "dense"
    save("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": MAP}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    (folder / "names.py").write_text("TYPE = 'own_llama'\n")
    return folder


def options_in(folder: Path) -> dict[str, Any]:
    save_tokens(tokens(1, 4000, seed=1)[0], folder / "tokens.safetensors")
    return {"sparsity": 0.5, "calibration": str(folder / "tokens.safetensors"), **SMALL}


def test_code_is_neither_run_nor_asked_for(dense: Path, tmp_path: Path) -> None:
    options = options_in(tmp_path)
    text = options["calibration"]
    loads: list[Callable[[], Any]] = [
        lambda: load_model(dense),
        lambda: load_stored(dense, device=torch.device("cpu")),
        lambda: msp.prune(dense, output=tmp_path / "out", **options),
        lambda: search(dense, stream=True, **options),
        lambda: msp.compare(dense, allocators=["uniform"], **options),
        lambda: sensitivity(dense, calibration=text, window=16, device="cpu"),
        lambda: evaluate(dense, evaluate=text, window=16),
        lambda: measure(dense, patterns="2:8"),
    ]
    for load in loads:
        with pytest.raises(MspError, match=r"Python code that comes with it.* --trust-remote-code\)") as error:
            load()
        assert "\n" not in str(error.value)
    for verb in (["info"], ["generate"]):
        run = CliRunner().invoke(app, [*verb, str(dense), *(["w7"] if verb == ["generate"] else [])], input="y\n")
        assert run.exit_code == 1 and "--trust-remote-code" in run.stderr.replace("\n", " ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("streamed", [False, True])
def test_trusted_code_serves_all_verbs_and_what_they_make(streamed: bool, dense: Path, tmp_path: Path) -> None:
    options = {**options_in(tmp_path), "allocator": "uniform", "trust_remote_code": True}
    out, text = tmp_path / "out", options["calibration"]
    result = msp.prune(dense, output=out, stream=streamed, **options)
    assert (tmp_path / "ran").exists()
    assert [(out / name).read_text() for name in ("own.py", "names.py")] == [
        (dense / name).read_text() for name in ("own.py", "names.py")
    ]
    assert json.loads((out / "config.json").read_text())["auto_map"] == MAP
    assert 'from_pretrained("PATH_OR_HUB_ID", trust_remote_code=True' in (out / "README.md").read_text()
    figures = evaluate(out, evaluate=text, window=16, test_tokens=64, reference=dense, trust_remote_code=True)
    assert figures.kl == pytest.approx(result.kl, rel=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(plain).__name__ == "OwnForCausalLM"

    def run(*arguments: object) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    trust = "--trust-remote-code"
    assert run("info", out)["packed"], "a packed model is described without its code"
    assert run("info", dense, trust)["architecture"] == "OwnForCausalLM"
    for model in (dense, out):
        assert run("generate", model, "w7 w8", trust, "--max-new-tokens", 2)["tokens"] == 2
        assert run("evaluate", model, "--evaluate", text, "--window", 16, trust)["perplexity"] > 1
    if not streamed:
        picture = tmp_path / "traces.png"
        tokens_of = ["--calibration", text, "--window", 16, "--calibration-tokens", 64]
        assert run("sensitivity", dense, *tokens_of, trust, "-o", picture)["traces"]
        assert run("measure", dense, "--patterns", "2:8", trust, "-o", tmp_path / "times.json")["linears"]


def test_a_tokenizer_with_its_own_code_needs_trust_too(dense: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    del config["auto_map"]
    (dense / "config.json").write_text(json.dumps(config))
    settings = json.loads((dense / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(MspError, match=r"the tokenizer of .* is Python code that comes with it"):
        load_model(dense)
    assert not (tmp_path / "ran").exists()
    options = {**options_in(tmp_path), "allocator": "uniform", "trust_remote_code": True}
    msp.prune(dense, output=tmp_path / "out", **options)
    loaded = load_model(tmp_path / "out", trust_remote_code=True)
    assert type(loaded.tokenizer).__name__ == "OwnTokenizer" and loaded.tokenizer("w7").input_ids == [7]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_workers_get_the_code_with_the_model(dense: Path, tmp_path: Path) -> None:
    options = {**options_in(tmp_path), "trust_remote_code": True, "evaluations": 4, "allocator": "msp"}
    alone = search(dense, **options)
    together = search(dense, workers=1, **options)
    assert together.loss == alone.loss and dict(together.allocation) == dict(alone.allocation)


def test_an_error_of_another_kind_does_not_ask_for_trust(dense: Path) -> None:
    settings = json.loads((dense / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((dense / "config.json").read_text()) | {"model_type": "llama"}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "tokenizer.json").write_text("{")
    with pytest.raises(MspError, match=r"the tokenizer cannot be read: .*line 1") as error:
        load_model(dense)
    assert "trust" not in str(error.value)
