"""``msp recover`` from the command line to a model that transformers loads, and the requests that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, build, llama_like, pack, save, save_text, shared, shared_model, tokenizer
from pairs import METHODS, pair
from transformers import AutoModelForCausalLM
from verbs import msp_run, one_object

import msp
from msp.base.safetensors_files import read_headers, read_tensor, tensor_files
from msp.errors import MspError, UsageError
from msp.evidence.evaluate import DenseReference
from msp.formats.patterns import NMPattern
from msp.models.loading import load_model
from msp.models.structure import find_structure
from msp.ops import nm_select, quantise_values
from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.info import read_info
from msp.recovery import training
from msp.text.training_sets import make_training_sets, parse_tokens

SIZES: dict[str, Any] = {
    "tokens": 1024,
    "window": 16,
    "batch_tokens": 64,
    "held_out_tokens": 128,
    "test_tokens": 64,
    "measurements": 4,
    "learning_rate": 3e-3,
    "device": "cpu",
}
WORDS = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a dense model in fp16, a packed one, and a text."""
    dense = save("llama", tmp_path / "dense", dtype=torch.float16)
    pruned = build("llama").half()
    recipe = {"model": "dense", "pruner": "magnitude"}
    linears = {linear.name: linear.weight.contiguous() for linear in find_structure(pruned).linears}
    patterns = [NMPattern.parse(each) for each in ("2:8", "4:8", "8:8", "0:8")]
    packed = {name: nm_select(each, patterns[i % 4]) for i, (name, each) in enumerate(linears.items())}
    replace_linears(pruned, packed)
    save_packed(pruned, tokenizer(), tmp_path / "packed", recipe=recipe)
    save_text(tmp_path / "notes.txt", seed=11)
    monkeypatch.chdir(tmp_path)
    assert dense.dtype == torch.float16
    return tmp_path


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    headers = read_headers(tensor_files(Path(folder)))
    return {name: read_tensor(headers, name) for name in headers}


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method: str, home: Path) -> None:
    asked = ["packed", "--teacher", "dense", "-o", "out", "--calibration", "notes.txt", "--method", method]
    found = one_object(msp_run("recover", *asked, *WORDS, "--json"))
    assert found["kept"] and found["held_out_loss"]["after"] < found["held_out_loss"]["before"]
    before, after = tensors("packed"), tensors("out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        if not name.endswith(("values", "weight", "bias")) or "embed" in name or "lm_head" in name:
            assert torch.equal(tensor, after[name]), name
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert bool(changed) and all("norm" in name for name in changed) == (method == "norms")
    one, other = read_info("packed"), read_info("out")
    assert [str(linear) for linear in one.linears] == [str(linear) for linear in other.linears]
    assert msp.validate_packed("out").recipe["recovery"] == other.recipe["recovery"]
    entry = other.recipe["recovery"]
    assert (entry["method"], entry["tokens"], entry["teacher"]) == (method, 1024, "dense")
    assert entry["held_out_loss"] == found["held_out_loss"]
    assert other.recipe["pruner"] == "magnitude"
    card = Path("out", "README.md").read_text()
    assert f"method: {method}" in card and "| Perplexity: recovered |" in card
    assert sorted(each.name for each in home.iterdir()) == [
        "dense",
        "notes.txt",
        "out",
        "packed",
    ]  # no checkpoints left

    # the figures are those of the saved model, as plain transformers loads it
    dense, model = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in ("dense", "out"))
    sets = make_training_sets("notes.txt", tokenizer(), VOCABULARY, window=16, training=64, held_out=8, test=4, seed=0)
    assert DenseReference(dense, sets.test).measure(model).kl == pytest.approx(found["kl"]["after"], rel=1e-4)
    total = DenseReference(dense, sets.held_out).total(model)
    loss = (2 * total.divergence + total.loss) / 3 / total.predicted
    assert loss == pytest.approx(found["held_out_loss"]["after"], rel=1e-5)


def test_the_python_function_and_a_second_recovery(home: Path) -> None:
    first = msp.recover("packed", teacher="dense", output="one", calibration="notes.txt", **SIZES)
    assert "held-out loss" in repr(first) and json.dumps(first.to_json())
    second = msp.recover("one", teacher="dense", output="two", method="norms", calibration="notes.txt", **SIZES)
    assert second.held_out_loss["before"] == first.held_out_loss["after"]
    assert read_info("two").recipe["recovery"]["earlier"]["method"] == "distil"
    assert second.perplexity["before"] == first.perplexity["after"]


def test_without_a_gain_the_files_are_those_of_the_pruned_model(home: Path) -> None:
    result = msp.recover(
        "packed", teacher="dense", output="out", calibration="notes.txt", **{**SIZES, "learning_rate": 50.0}
    )
    assert not result.kept and result.kl["before"] == result.kl["after"]
    before, after = tensors("packed"), tensors("out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert "the model is as it was" in repr(result)


def test_model_objects(home: Path) -> None:
    student, teacher = pair("gpt2")
    teacher.requires_grad_(True).train()
    result = msp.recover(
        student, teacher=teacher, tokenizer=tokenizer(), calibration="notes.txt", method="blockwise", **SIZES
    )
    assert result.kept and result.model is student
    assert result.recipe["recovery"]["method"] == "blockwise"
    assert teacher.training and all(each.requires_grad and each.grad is None for each in teacher.parameters())
    msp.save_packed(student, tokenizer(), "saved", recipe=result.recipe)
    assert msp.validate_packed("saved").recipe["recovery"]["kept"]
    with pytest.raises(MspError, match=r"is float16, and recovery trains in float32"):
        half = AutoModelForCausalLM.from_pretrained("packed", dtype=torch.float16)
        msp.recover(half, teacher="dense", tokenizer=tokenizer(), calibration="notes.txt", **SIZES)


def test_a_model_whose_forward_changes_weights_is_refused(home: Path) -> None:
    student, teacher = pair("rwkv")
    with pytest.raises(MspError, match=r"a forward changes .*: recovery of such a model is not built"):
        msp.recover(student, teacher=teacher, tokenizer=tokenizer(), calibration="notes.txt", **SIZES)


def test_resume(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["packed", "--teacher", "dense", "--calibration", "notes.txt", *WORDS]
    assert msp_run("recover", *asked, "-o", "whole").exit_code == 0
    step = training._Watch._step

    def stopped(watch: Any, state: Any, control: Any) -> None:
        if state.global_step == 11:
            raise KeyboardInterrupt
        step(watch, state, control)

    monkeypatch.setattr(training._Watch, "_step", stopped)
    result = msp_run("recover", *asked, "-o", "out")
    assert result.exit_code == 1 and "--resume" in result.stderr
    assert not Path("out").exists() and Path(".out.recover", "recovery.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(home)
    other = msp_run("recover", *asked, "-o", "out", "--resume", "--batch-tokens", "32")
    assert other.exit_code == 1 and "batch tokens 32, was 64" in " ".join(other.stderr.split())
    result = msp_run("recover", *asked, "-o", "out", "--resume")
    assert result.exit_code == 0, result.stderr
    assert all(torch.equal(each, tensors("out")[name]) for name, each in tensors("whole").items())
    assert not Path(".out.recover").exists()
    assert read_info("out").recipe == read_info("whole").recipe
    shutil.rmtree("out")
    result = msp_run("recover", *asked, "-o", "out", "--resume")
    assert result.exit_code == 0 and "nothing to resume" in result.stderr


def test_other_weights_are_not_resumed(home: Path) -> None:
    asked = {"teacher": "dense", "calibration": "notes.txt", "work_dir": "work", **SIZES}
    first = msp.recover("packed", **asked, output="out")
    with pytest.raises(MspError, match="the weights differ"):
        msp.recover("out", **asked, resume=True)
    with pytest.raises(MspError, match="seed 1, was 0"):
        msp.recover("packed", **asked, resume=True, seed=1)
    assert msp.recover("packed", **asked, resume=True).phases == first.phases
    with pytest.warns(UserWarning, match="work: the checkpoints of an earlier training are replaced"):
        msp.recover("packed", **asked, seed=1)


def coded(home: Path) -> str:
    model = build("llama")
    weights = {linear.name: linear.weight.contiguous() for linear in find_structure(model).linears}
    packed = {name: nm_select(weight, NMPattern(2, 8)) for name, weight in weights.items()}
    replace_linears(model, {name: quantise_values(each, "int8/32") for name, each in packed.items()})
    save_packed(model, tokenizer(), home / "coded", recipe={})
    return "coded"


def test_wrong_requests_come_before_any_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msp.session.recoverable.load_model", lambda *_, **__: pytest.fail("weights were read"))
    asked = {"teacher": "dense", "calibration": "notes.txt", **SIZES}
    for changed, message in (
        ({"method": "lora"}, "recovery method 'lora' is not one of blockwise, distil, norms"),
        ({"tokens": "many"}, "'many' is not a number of tokens"),
        ({"tokens": 0}, "0 is not a number of tokens"),
        ({"epochs": 0}, "epochs 0 is not a whole number from 1"),
        ({"measurements": -1}, "measurements -1"),
        ({"kl_weight": 2.0}, r"outside \[0, 1\]"),
        ({"learning_rate": -1.0}, "learning rate"),
        ({"window": 1}, "predicts nothing"),
        ({"window": 4096}, "longer than the model's context"),
        ({"seed": -1}, "seed"),
        ({"resume": True}, "resume needs work_dir"),
        ({"tokns": 5}, "did you mean tokens"),
        ({"teacher": "packed"}, "packed is a packed model: the teacher is the dense one"),
        ({"device": "meta"}, "not on meta"),
    ):
        with pytest.raises(UsageError, match=message):
            msp.recover("packed", **{**asked, **changed})
    save("llama", home / "wide", dtype=torch.float16)
    for changed, message in (
        ({"tokens": "1M"}, r"notes.txt is too short: \d+ tokens found, 1\d{6} needed .*more passes"),
        ({"calibration": "absent.txt"}, "absent.txt"),
        ({"output": "packed"}, "exists already"),
        ({"output": "notes.txt", "force": True}, "not a model"),
    ):
        with pytest.raises(MspError, match=message):
            msp.recover("packed", **{**asked, **changed})
    with pytest.raises(MspError, match="dense is not a packed model: prune it first"):
        msp.recover("dense", **asked)
    with pytest.raises(MspError, match=r"stored as 2:8\+int8/32, and recovery of coded values is not built"):
        msp.recover(coded(home), **asked)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes is not built"):
        msp.recover("packed", **asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": VOCABULARY + 8}, "vocabulary of 104, and packed one of 96"),
        ({"intermediate_size": 96}, r"down_proj.weight is \[32, 96\], and \[32, 64\] in packed"),
        ({"num_hidden_layers": 3}, r"layers.2.* is .*, and absent in packed"),
    ],
)
def test_a_teacher_that_is_another_model(changes: dict[str, int], message: str, home: Path) -> None:
    config = llama_like("LlamaConfig", num_key_value_heads=4, tie_word_embeddings=False)()
    for name, value in changes.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "other")
    with pytest.raises(MspError, match=message):
        msp.recover("packed", teacher="other", calibration="notes.txt", **SIZES)


def test_accelerate_is_named_if_it_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(MspError, match=r"accelerate: pip install 'mixed-sparsity-pruning\[recover\]'"):
        msp.recover("packed", teacher="dense", calibration="notes.txt", **SIZES)


def test_tokens_of_a_test_are_not_trained_on(home: Path) -> None:
    """Those of the recovery, and those on which the packed model was tested, which may be more."""
    sets = make_training_sets("notes.txt", tokenizer(), VOCABULARY, window=16, training=20, held_out=3, test=5, seed=3)
    windows = torch.cat([sets.test, sets.held_out, sets.training])
    text = make_training_sets("notes.txt", tokenizer(), VOCABULARY, window=16, training=1, held_out=1, test=28).test
    assert torch.equal(torch.cat([sets.test, sets.held_out]), text[:8])
    assert sorted(map(tuple, windows.tolist())) == sorted(map(tuple, text.tolist()))
    assert not torch.equal(sets.training, text[8:])
    other = make_training_sets("notes.txt", tokenizer(), VOCABULARY, window=16, training=9, held_out=3, test=5, seed=4)
    assert torch.equal(other.held_out, sets.held_out) and torch.equal(other.test, sets.test)

    seen: list[torch.Tensor] = []
    model = build("llama")
    replace_linears(model, pack(model, ("2:8",)))
    told = {"calibration": "notes.txt", "evaluate": "notes.txt (held out)", "test_tokens": 512}
    save_packed(model, tokenizer(), home / "tested", recipe={"calibration": told})
    from msp.verbs import recover as verb

    def noted(*arguments: Any, **options: Any) -> Any:
        found = make_training_sets(*arguments, **options)
        seen.extend([found.training, found.held_out])
        return found

    original = verb.make_training_sets
    verb.make_training_sets = noted
    try:
        msp.recover("tested", teacher="dense", calibration="notes.txt", **SIZES)
    finally:
        verb.make_training_sets = original
    first = make_training_sets("notes.txt", tokenizer(), VOCABULARY, window=16, training=1, held_out=1, test=32).test
    assert not {*map(tuple, first.tolist())} & {*map(tuple, torch.cat(seen).tolist())}


def test_numbers_of_tokens() -> None:
    assert [parse_tokens(each) for each in ("2M", "1.5k", " 500 k ", "1B", "7", 9)] == [
        2_000_000,
        1500,
        500_000,
        1_000_000_000,
        7,
        9,
    ]
    for wrong in ("", "2m", "-1", "0", "0.1", 0, -3, 1.5, True, "9" * 30):
        with pytest.raises(UsageError, match="is not a number of tokens"):
            parse_tokens(wrong)


def test_epochs_read_less_text(home: Path) -> None:
    result = msp.recover(
        "packed", teacher="dense", calibration="notes.txt", **{**SIZES, "tokens": "8192", "epochs": 4}, method="norms"
    )
    assert result.tokens == 8192 and result.phases[0]["steps"] == 128
    assert result.recipe["recovery"]["text"]["training_tokens"] == 2048


def test_forwards_with_fewer_tokens_take_the_same_steps(home: Path) -> None:
    found = [
        msp.recover("packed", teacher="dense", calibration="notes.txt", **SIZES, forward_tokens=size).phases[0]["steps"]
        for size in (2048, 16)
    ]
    assert found == [16, 16]


@pytest.mark.parametrize("method", ["distil", "blockwise"])
def test_a_trained_model_comes_back(method: str, tmp_path: Path) -> None:
    """A small model of stories: the divergence falls on text that it was never trained on."""
    path, text = shared_model("stories260k"), shared("data", "tinystories-sample.txt")
    loaded = load_model(path)
    replace_linears(loaded.model, pack(loaded.model, ("4:8",)))
    save_packed(loaded.model, loaded.tokenizer, tmp_path / "half", recipe={}, origin=path)
    result = msp.recover(
        tmp_path / "half",
        teacher=path,
        method=method,
        calibration=str(text),
        window=128,
        tokens=20_000,
        batch_tokens=512,
        held_out_tokens=2048,
        test_tokens=2048,
        measurements=2,
        device="cpu",
    )
    assert result.kl["after"] < 0.7 * result.kl["before"]
    assert result.perplexity["dense"] < result.perplexity["after"] < result.perplexity["before"]
