"""What is kept between runs is used again by the same question alone, and a refusal names what differs."""

from __future__ import annotations

import shutil
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, build, save, save_text
from killing import run_forked
from safetensors.torch import load_file, save_file

import msp
from msp import pareto
from msp.base.identity import differences, hashed, hashed_code, hashed_data, hashed_tensors
from msp.compressions.nm_database import LevelDatabase
from msp.errors import MspError

ASKED: dict[str, Any] = {**SMALL, "sparsity": 0.7, "evaluations": 16}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and a text for it."""
    save("llama", tmp_path / "model")
    save_text(tmp_path / "text.txt", 7)
    return tmp_path


def run(home: Path, *, model: str = "model", text: str = "text.txt", **changes: Any) -> Any:
    asked = {**ASKED, "calibration": str(home / text), "work_dir": home / "work", **changes}
    return msp.search(home / model, **asked)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("searched")
    save("llama", path / "model")
    save_text(path / "text.txt", 7)
    run(path)
    return path


@pytest.fixture
def searched(once: Path, tmp_path: Path) -> Path:
    """A folder as ``home``, and what a search left in it."""
    return shutil.copytree(once, tmp_path / "home")


def other_weight(home: Path) -> dict[str, Any]:
    """One bit of one weight, in the file: the kind of change that a path or a date does not tell."""
    file = home / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    return {}


def other_settings(home: Path) -> dict[str, Any]:
    file = home / "model" / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    return {}


def other_text(home: Path) -> dict[str, Any]:
    """The first word of the part that the draw takes from is another."""
    words = (home / "text.txt").read_text().split()
    (home / "text.txt").write_text(" ".join([*words[:64], *("w9" for _ in words[64:])]))
    return {}


CHANGES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "weights": (other_weight, "the weights differ"),
    "config": (other_settings, "the model settings differ"),
    "text": (other_text, "the calibration tokens differ; the fitness tokens differ"),
    "fitness tokens": (lambda _: {"fitness_tokens": 48}, "the calibration tokens differ; the fitness tokens differ"),
    "noise": (lambda _: {"fitness_noise": 0.5}, "the fitness tokens differ"),
    "dtype": (lambda _: {"dtype": "bfloat16"}, "the weights differ.*"),
    "seed": (lambda _: {"seed": 1}, "seed 1, was 0; the calibration tokens differ; the fitness tokens differ"),
    "pruner": (lambda _: {"pruner": "magnitude"}, r"pruner MagnitudePruner\(\), was WandaPruner\(\)"),
    "fitness": (
        lambda _: {"fitness": "perplexity", "fitness_noise": 0.15},
        "the fitness tokens differ; fitness perplexity, was kl",
    ),
    "candidates": (lambda _: {"candidates": "database"}, "candidates database, was ranks"),
    "budget": (lambda _: {"sparsity": 0.6}, "budget [0-9]+, was [0-9]+"),
    "patterns": (lambda _: {"patterns": "0:8,2:8,4:8"}, "the patterns differ; the costs of the patterns differ"),
    "units": (lambda _: {"unit": "block"}, "the patterns differ; the costs of the patterns differ"),
    "kept": (lambda _: {"keep": "layers.0.*=4:8"}, "the patterns differ; the costs of the patterns differ"),
    "option": (lambda _: {"search_options": "emptied: 1"}, "search option emptied 1, was 2"),
    "allocator": (lambda _: {"allocator": "msp-random"}, "the first individuals differ"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_search_is_not_resumed_by_another_question(what: str, searched: Path) -> None:
    before = (searched / "work" / "search.json").read_bytes()
    change, told = CHANGES[what]
    changes = change(searched)
    with pytest.raises(MspError, match=rf"search\.json belongs to another search: {told}; start anew without resume$"):
        run(searched, resume=True, **changes)
    assert (searched / "work" / "search.json").read_bytes() == before


def test_other_weights_are_refused_before_any_work(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(home)
    other_weight(home)
    monkeypatch.setattr(
        "msp.session.workbench.Workbench.fisher_traces", lambda _: pytest.fail("worked before it looked")
    )
    monkeypatch.setattr(
        "msp.session.workbench.Workbench.predictions", lambda *_, **__: pytest.fail("worked before it looked")
    )
    for verb in (msp.search, msp.prune):
        asked = {**ASKED, "calibration": str(home / "text.txt"), "work_dir": home / "work", "resume": True}
        with pytest.raises(MspError, match="the weights differ"):
            verb(home / "model", **asked)


def test_the_same_weights_in_another_place_are_the_same_question(home: Path) -> None:
    whole = run(home, evaluations=48, work_dir=None)
    run(home)
    shutil.move(home / "model", home / "moved")
    shutil.copy(home / "text.txt", home / "copy.txt")
    resumed = run(home, model="moved", text="copy.txt", evaluations=48, resume=True)
    assert resumed.history == whole.history and resumed.allocation == whole.allocation


def test_a_streamed_model_is_the_one_in_memory(home: Path) -> None:
    """The hash of the weights is made block by block there, from the files."""
    whole = run(home, evaluations=48, work_dir=None)
    run(home, stream=True)
    resumed = run(home, evaluations=48, resume=True)
    assert resumed.history == whole.history and resumed.allocation == whole.allocation
    other_weight(home)
    with pytest.raises(MspError, match="the weights differ"):
        run(home, stream=True, resume=True)


def test_a_database_alone_is_looked_at_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"pruner": "sparsegpt", "resume": True}
    run(home, **{**asked, "resume": False})
    (home / "work" / "search.json").unlink()
    monkeypatch.setattr(LevelDatabase, "write", lambda *_: pytest.fail("what is there is made again"))
    run(home, **asked)
    (home / "work" / "search.json").unlink()
    other_weight(home)
    with pytest.raises(MspError, match=r"database is the level database of another run: the weights differ; start"):
        run(home, **asked)


def test_every_budget_is_looked_at_before_the_first_is_searched(home: Path) -> None:
    asked = {**SMALL, "evaluations": 16, "calibration": str(home / "text.txt"), "work_dir": home / "work"}
    pareto(home / "model", sparsities=[0.5, 0.7], **asked)
    (home / "work" / "0.5" / "search.json").unlink()
    other_weight(home)
    with pytest.raises(MspError, match=r"0\.7.search\.json belongs to another search: the weights differ"):
        pareto(home / "model", sparsities=[0.5, 0.7], resume=True, **asked)
    assert not (home / "work" / "0.5" / "search.json").exists()


def test_nothing_to_resume_is_said(home: Path) -> None:
    with pytest.warns(UserWarning, match=r"nothing to resume in .*work: the search starts anew"):
        first = run(home, resume=True)
    assert first.history == run(home, work_dir=None).history
    asked = {**SMALL, "evaluations": 16, "calibration": str(home / "text.txt"), "work_dir": home / "several"}
    pareto(home / "model", sparsities=[0.5, 0.7], **asked)
    (home / "several" / "0.7" / "search.json").unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="nothing to resume")
        pareto(home / "model", sparsities=[0.5, 0.7], resume=True, **asked)


def test_a_checkpoint_of_an_earlier_version_is_refused(home: Path) -> None:
    (home / "work").mkdir()
    (home / "work" / "search.json").write_text('{"identity": "0123abc", "generation": 3}')
    with pytest.raises(MspError, match=r"search\.json is not a search checkpoint: this msp does not read it"):
        run(home, resume=True)


LOSS = """
    WEIGHT = {weight}

    def helper(logits, tokens):
        return WEIGHT * -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum()

    def loss(logits, tokens):
        return helper(logits, tokens)
"""


def test_a_loss_of_the_users_own_is_looked_into(home: Path) -> None:
    """Each run in a process of its own, as a user has it: the module of the loss is imported anew."""
    arguments = ["--window=16", "--calibration-tokens=64", "--fitness-tokens=64", "--test-tokens=64", "--device=cpu"]
    arguments += ["--calibration=text.txt", "--evaluations=16", "--fitness=mine:loss", "--work-dir=work", "-o", "out"]

    def search(weight: float, *more: str) -> tuple[int | None, str]:
        shutil.rmtree(home / "__pycache__", ignore_errors=True)  # which knows times of whole seconds only
        (home / "mine.py").write_text(textwrap.dedent(LOSS.format(weight=weight)))
        code, _, told = run_forked(["search", "model", *arguments, *more], home)
        return code, told

    assert search(1.0)[0] == 0
    assert search(1.0, "--resume")[0] == 0
    code, told = search(2.0, "--resume")
    assert code == 1 and "the sources of the fitness differ" in told


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, logits: torch.Tensor, tokens: torch.Tensor) -> float:
        return self.weight


def weighted(weight: float) -> Callable[..., float]:
    return lambda logits, tokens: weight


def test_code_is_told_apart_by_what_it_holds() -> None:
    for make in (Weighted, weighted, lambda weight: Weighted(weight).__call__):
        assert hashed_code(make(1.0)) == hashed_code(make(1.0)) != hashed_code(make(2.0))
    assert hashed_code(weighted) != hashed_code(Weighted)


def test_the_hash_of_a_tensor_is_of_its_bytes_shape_and_dtype() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    assert hashed(tensor) == hashed(tensor.clone()) == hashed(tensor.t().contiguous().t())
    others = [tensor.reshape(6, 4), tensor.view(torch.int32), tensor.double(), -tensor, tensor[:3], tensor.t()]
    assert len({hashed(each) for each in [tensor, *others]}) == 7
    assert hashed(torch.zeros(2)) != hashed(-torch.zeros(2))
    assert hashed(torch.tensor(3)) != hashed(torch.tensor([3])) and hashed(torch.empty(0)) != hashed(torch.empty(0, 2))


def test_tied_weights_and_order_do_not_matter() -> None:
    model = build("llama-tied")
    state = model.state_dict(keep_vars=True)
    found = hashed_tensors(state)
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert hashed_data(found) == hashed_data(dict(reversed(hashed_tensors(dict(reversed(state.items()))).items())))


def test_differences_are_named() -> None:
    was = {"seed": "0", "weights": hashed("a"), "fitness": "kl"}
    assert differences(was, dict(was)) == []
    assert differences({**was, "seed": "1", "weights": hashed("b")}, was) == ["seed 1, was 0", "the weights differ"]
    assert differences({"seed": "0"}, was) == ["the weights differ", "the fitness differ"]
    assert differences({"seed": "0"}, was, partial=True) == []
    assert differences({"new": "1", **was}, was) == ["the new differ"]
    assert differences(was, {**was, "seed": 0}) == ["the seed differ"]
