"""The examples in the documents work as printed, and their commands parse."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main
from documents import DOCUMENTS, ROOT, document_name, example, load
from families import SMALL, build, packed_model, same_state, save, save_text, tokenizer, tokens
from transformers import AutoModelForCausalLM
from verbs import SMALL as VERB_SIZES
from verbs import msp_run, one_object

import msp
from msp.allocators import base as allocators
from msp.cli import app
from msp.errors import UsageError
from msp.formats import storage
from msp.formats.patterns import NMPattern
from msp.models.structure import find_structure
from msp.ops import _dispatch, available_backends, force_backend, last_backend, nm_select, quantise_values
from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.info import read_info, validate_packed
from msp.pruners import base


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and the text that the documents speak of."""
    save("llama", tmp_path / "path" / "to" / "model")
    save_text(tmp_path / "notes.txt", seed=11)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_the_python_examples_run(document: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    prune = functools.partial(msp.prune, **SMALL, evaluations=16)
    monkeypatch.setattr(msp, "prune", prune)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, document, "exec"), {})
        assert (workplace / "model-75" / "model.safetensors").is_file()
        assert msp.read_info("model-75").kept > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_name)
def test_the_commands_parse(document: Path):
    text = document.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`(msp [a-z]+ [^`]+)`", text)
    verbs = typer.main.get_command(app).commands
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["msp"]:
            verbs[words[1]].make_context(words[1], words[2:])


JSON_OF = {
    "prune": ["model", "-o", "out", "--sparsity", "0.5", "--evaluations", "16"],
    "prune --dry-run": ["model", "-o", "other", "--sparsity", "0.5"],
    "search": ["model", "-o", "found", "--sparsity", "0.5", "--evaluations", "16"],
    "search ": ["model", "-o", "curve", "--sparsity", "0.5,0.6", "--evaluations", "16"],
    "compare": ["model", "--sparsity", "0.5", "--allocators", "uniform", "--seeds", "1"],
    "recover": [
        *("packed", "--teacher", "model", "-o", "out", "--calibration", "notes.txt", "--window", "16"),
        *("--tokens", "256", "--held-out-tokens", "64", "--test-tokens", "64", "--method", "norms"),
    ],
    "sensitivity": ["model", "--calibration", "notes.txt", "--window", "16", "--calibration-tokens", "64"],
    "evaluate": ["packed", "--evaluate", "notes.txt", "--reference", "model", "--window", "16"],
    "generate": ["packed", "w5 w6"],
    "export": ["packed", "--dense", "-o", "dense"],
    "info": ["packed", "--verify"],
    "info ": ["model"],
}


@pytest.mark.parametrize("verb", JSON_OF)
def test_the_guide_names_all_that_json_has(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("llama", tmp_path / "model")
    save_packed(packed_model("llama"), tokenizer(), tmp_path / "packed", recipe={})
    save_text(tmp_path / "notes.txt", seed=11)
    sizes = ["--calibration", "notes.txt", *VERB_SIZES] if verb.split()[0] in ("prune", "search", "compare") else []
    found = one_object(msp_run(*verb.split(), *JSON_OF[verb], *sizes, "--json"))
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    listed = "".join(re.findall(rf"^- `{verb.split()[0]}.*?(?=^- |^$)", guide, re.DOTALL | re.MULTILINE))
    # those of search are said to be those of prune
    listed += "".join(re.findall(r"^- `prune`:.*?(?=^- |^$)", guide, re.DOTALL | re.MULTILINE)) * (verb == "search")
    rows = found.get("rows") or found.get("points") or [{}]
    assert [key for key in (*found, *rows[0]) if f"`{key}`" not in listed] == []


def test_the_pruner_prunes(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base.PRUNERS, "factories", dict(base.PRUNERS.factories))
    load("balanced", example("pruner"), workplace)
    result = msp.prune(
        "path/to/model", sparsity=0.5, pruner="balanced", calibration="notes.txt", evaluations=16, **SMALL
    )
    assert 0.49 < result.density <= 0.5

    generator = torch.Generator().manual_seed(5)
    weight, sums = torch.randn(6, 32, generator=generator), torch.rand(32, generator=generator) * 9
    statistics = base.LinearStatistics(tokens=1, input_sum_squares=sums)
    for power in (0.0, 0.3, 1.0):
        score = (weight.abs() * sums.sqrt() ** power).reshape(6, 4, 8)
        expected = (score >= score.sort(descending=True).values[..., 2:3]).reshape(6, 32)
        packed = base.get_pruner("balanced", power=power).prune(weight, statistics, NMPattern(3, 8))
        assert torch.equal(packed.kept(), expected)
    with pytest.raises(UsageError, match="power 2 is outside"):
        base.get_pruner("balanced", power=2)


def test_the_allocator_allocates(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocators.ALLOCATORS, "factories", dict(allocators.ALLOCATORS.factories))
    load("ends", example("allocator"), workplace)
    result = msp.prune("path/to/model", sparsity=0.6, allocator="ends", calibration="notes.txt", **SMALL)
    assert 0.39 < result.density <= 0.4


def test_the_compression_compresses(tmp_path: Path):
    model = build("llama")
    together = example("compression") + "\n\n" + example("compression-search")
    labels = load("scaling", together, tmp_path).search(model, tokens(8, 17, seed=1), 0.5)
    assert labels.keys() == {linear.name for linear in find_structure(model).linears}
    assert set(labels.values()) <= {"x0", "x1/2", "x1"} and len(set(labels.values())) > 1


def test_the_way_of_storing_values_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(storage, "_ways", [*storage._ways])
    load("fp8_values", example("values"), tmp_path)
    model = build("llama")
    linears = {linear.name: linear.weight.detach() for linear in find_structure(model).linears}
    packed = {name: quantise_values(nm_select(weight, NMPattern(2, 8)), "fp8") for name, weight in linears.items()}
    for name, weight in packed.items():
        near = nm_select(linears[name], NMPattern(2, 8)).unpack()
        torch.testing.assert_close(weight.unpack(), near, rtol=2**-4, atol=2**-10)
    replace_linears(model, packed)
    folder = save_packed(model, None, tmp_path / "out", recipe={})
    assert {str(linear.storage) for linear in validate_packed(folder).linears} == {"2:8+fp8"}
    assert {linear.bits_per_weight for linear in read_info(folder).linears} == {3.0}
    assert same_state(AutoModelForCausalLM.from_pretrained(folder), model)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_op_and_its_kernel_agree(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("msp.ops._dispatch._ops", dict(_dispatch._ops))
    load("msp.triton_kernels.nm_energy", example("kernel"), tmp_path)
    # torch's registry cannot forget, so that every run of this test needs a name of its own
    op = load("nm_energy_example", example("op").replace("msp::nm_energy", f"msp_docs::nm_energy_{dtype}"), tmp_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(2)).to(device, getattr(torch, dtype))
    expected = weight.double().square().reshape(7, 6, 8).sum(-1)
    backends = available_backends("nm_energy")
    assert set(backends) >= {"reference", "triton"}
    for backend in backends:
        with force_backend(backend):
            torch.testing.assert_close(op.nm_energy(weight, 8).double(), expected, rtol=1e-5, atol=1e-5)
        assert last_backend("nm_energy") == backend
    torch.library.opcheck(op.nm_energy_op, (weight, 8))
    with pytest.raises(ValueError, match="multiple of 5"):
        op.nm_energy(weight, 5)
