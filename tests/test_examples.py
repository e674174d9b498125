"""Every script in examples/ runs on a tiny model, is short, and is named where users look for it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES, llama_like, packed_model, save, save_text, tokenizer
from transformers.utils import logging

import msp
from msp.allocators import base as allocators
from msp.packed.checkpoint import save_packed
from msp.pruners import base as pruners

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = ("--tokens", "256", "--evaluations", "16")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a dense model, a packed one and a text in it."""
    logging.disable_progress_bar()
    save("llama", tmp_path / "model")
    save_packed(packed_model("llama"), tokenizer(), tmp_path / "packed", recipe={})
    save_text(tmp_path / "notes.txt", seed=11)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pruners.PRUNERS, "factories", dict(pruners.PRUNERS.factories))
    monkeypatch.setattr(allocators.ALLOCATORS, "factories", dict(allocators.ALLOCATORS.factories))
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example in this process and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def figures(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_prune(run) -> None:
    printed = run("prune", "model", "notes.txt", "out", *SMALL)
    (density,) = figures(r"density ([\d.]+)%", printed)
    assert 24 < density <= 25
    assert msp.read_info("out").kept > 0
    assert len(printed.splitlines()[-1].split()) > 4  # the text that it wrote


def test_search_then_prune(run) -> None:
    printed = run("search_then_prune", "model", "notes.txt", "found", "out", *SMALL)
    allocation = json.loads(Path("found", "allocation.json").read_text())
    for line in printed.splitlines()[:5]:
        name, pattern = line.split(": ")
        assert allocation[name] == pattern
    assert {linear.name: str(linear.pattern) for linear in msp.read_info("out").linears} == allocation


def test_compare_allocators(run) -> None:
    names = ["uniform", "ramp", "msp"]
    printed = run("compare_allocators", "model", "notes.txt", "--seeds", "1", "--allocators", ",".join(names), *SMALL)
    assert re.findall(r"^([\w-]+) with wanda: KL [\d.]+, perplexity [\d.]+$", printed, re.MULTILINE) == names


def test_pareto_curve(run) -> None:
    printed = run("pareto_curve", "model", "notes.txt", "curve", *SMALL)
    losses, sizes = figures(r"KL ([\d.]+)", printed), figures(r"([\d.]+) MB", printed)
    assert len(losses) == 3 and sizes == sorted(sizes, reverse=True)
    assert Path("curve", "pareto.png").is_file() and Path("curve", "0.75", "recipe.yaml").is_file()


def test_evaluate_quality(run) -> None:
    printed = run("evaluate_quality", "packed", "notes.txt", "--reference", "model", "--tokens", "256")
    assert figures(r"perplexity ([\d.]+)", printed)[0] > 1
    assert figures(r"KL to the dense model ([\d.]+)", printed)[0] > 0
    assert "KL" not in run("evaluate_quality", "model", "notes.txt", "--tokens", "256")


def test_own_pruner(run) -> None:
    printed = run("own_pruner", "model", "notes.txt", "--tokens", "256")
    found = dict(re.findall(r"^([\w-]+), seed 0: KL ([\d.]+)$", printed, re.MULTILINE))
    assert list(found) == ["wanda", "soft-wanda"] and len(set(found.values())) == 2


def test_own_allocator(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "deep", llama_like("LlamaConfig", num_hidden_layers=5))
    save("deep", Path("deep"))
    printed = run("own_allocator", "deep", "notes.txt", "--tokens", "256")
    found = dict(re.findall(r"^([\w-]+), seed 0: KL ([\d.]+)$", printed, re.MULTILINE))
    assert list(found) == ["uniform", "ramp", "both-ends"] and len(set(found.values())) == 3


def test_own_fitness(run) -> None:
    (loss,) = figures(r"^loss ([\d.]+) a token", run("own_fitness", "model", "notes.txt", *SMALL))
    assert loss > 0


def test_export_dense(run) -> None:
    (difference,) = figures(r"up to ([\d.e+-]+)$", run("export_dense", "packed", "dense").strip())
    assert difference < 1e-4
    with pytest.raises(msp.MspError, match="dense"):
        msp.read_info("dense")  # which is no packed model


def test_train_lora(run) -> None:
    pytest.importorskip("peft", reason="needs peft")
    Path("easy.txt").write_text("w5 w6 w7 w8 " * 100)
    losses = figures(
        r"loss ([\d.]+)", run("train_lora", "packed", "easy.txt", "tuned", "--steps", "15", "--window", "16")
    )
    assert len(losses) == 15 and losses[-1] < losses[0] - 0.1
    patterns = [[str(linear.pattern) for linear in msp.read_info(path).linears] for path in ("packed", "tuned")]
    assert patterns[0] == patterns[1]


def test_recover(run) -> None:
    asked = ("--tokens", "2k", "--batch-tokens", "64", "--held-out", "256", "--window", "16")
    printed = run("recover", "packed", "model", "notes.txt", "out", *asked)
    before, after = figures(r"held-out loss ([\d.]+) ->", printed), figures(r"held-out loss .* -> ([\d.]+)", printed)
    assert after[0] < before[0]
    patterns = [[str(linear.pattern) for linear in msp.read_info(path).linears] for path in ("packed", "out")]
    assert patterns[0] == patterns[1]


def test_stream_large_model(run) -> None:
    printed = run("stream_large_model", "model", "notes.txt", "out", "--tokens", "256", "--hidden-bytes", "1MB")
    assert figures(r"KL ([\d.]+)", printed)[0] > 0
    assert msp.read_info("out").kept > 0


def test_run_lm_eval(workplace: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval")
    # a process of its own: the libraries that lm-eval takes along read where their caches are when they are imported
    environment = {**os.environ, "HF_HOME": str(workplace / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "examples" / "run_lm_eval.py"), "packed", "notes.txt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert figures(r"'bits_per_byte,none': ([\d.]+)", done.stdout)[0] > 0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_tested_and_listed(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 40
    assert f"def test_{example.stem}(" in Path(__file__).read_text(encoding="utf-8")
    assert f"({example.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
