"""The demo: its text, its tokenizer, its training and its cache, and the whole of it at a small size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from msp.base.progress import NoProgress
from msp.cli import demo
from msp.cli.demo import Corpus, DemoSettings, Effort, Muon, Row, byte_tokenizer, run, standard_library, train
from msp.errors import MspError

TINY = DemoSettings(hidden=32, feed_forward=64, blocks=2, heads=2, context=48, batch=4, steps=40, warmup=4)
LITTLE = Effort(
    calibration_tokens=192, fitness_tokens=192, test_tokens=384, evaluations=16, timed_tokens=6, timed_runs=2
)
CORPUS = Corpus(
    train=tuple(f"def function_{i}(x):\n    return x + {i}\n" * 4 for i in range(40)),
    calibration=tuple(f"def other_{i}(y):\n    return y - {i}\n" * 4 for i in range(20)),
    test=tuple(f"class Thing{i}:\n    value = {i}\n" * 4 for i in range(20)),
)


def test_the_standard_library_is_split_by_file():
    corpus = standard_library(3_000_000)
    parts = (corpus.train, corpus.calibration, corpus.test)
    assert 1_500_000 < sum(len(text.encode()) for part in parts for text in part) <= 3_000_000
    assert len(set(corpus.train) & set(corpus.test)) == len(set(corpus.train) & set(corpus.calibration)) == 0
    assert all(sum(map(len, part)) > 50_000 for part in parts)
    assert standard_library(3_000_000).digest == corpus.digest


def test_a_python_without_sources_is_told(tmp_path: Path):
    (tmp_path / "os.pyc").write_bytes(b"x")
    with pytest.raises(MspError, match="no Python sources"):
        standard_library(1000, tmp_path)


def test_files_that_are_no_text_and_folders_of_tests_are_left_out(tmp_path: Path):
    for index in range(40):
        (tmp_path / f"m{index:02}.py").write_text(f"x = {index}\n")
    (tmp_path / "m50.py").write_bytes(b"\xff\xfe")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("secret = 1\n")
    corpus = standard_library(10_000, tmp_path)
    texts = [*corpus.train, *corpus.calibration, *corpus.test]
    assert sorted(texts) == sorted(f"x = {index}\n" for index in range(40))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(48).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1))
def test_a_token_is_a_byte(tokenizer, text: str):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 256
    assert bytes(ids[1:]) == text.encode()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 259


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_moves_along_orthogonal_directions(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(sum(shape))
    weights = [torch.zeros(shape) for _ in range(3)]
    muon = Muon(weights, decay=0.0)
    for weight in weights:
        weight.grad = torch.randn(shape, generator=generator) * 10 ** float(torch.rand((), generator=generator))
    gradients = [weight.grad.clone() for weight in weights]
    muon.step(1.0)
    for weight, gradient in zip(weights, gradients, strict=True):
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        values = torch.linalg.svdvals(weight) / scale
        assert values.max() < 1.5
        assert shape[0] == shape[1] or values.min() > 0.5, "of a square random matrix some are too small to be lifted"
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        assert torch.nn.functional.cosine_similarity((-weight).flatten(), (u @ v).flatten(), dim=0) > 0.95
        assert weight.grad is None


class Recorder(NoProgress):
    """Remembers the stages, and can interrupt one after some steps."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stages: list[str] = []
        self.losses: list[float] = []
        self._stop_at = stop_at

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator:
        self.stages.append(name)

        def advance(done: int, total: int | None = None, /, **info) -> None:
            if "loss" in info:
                self.losses.append(info["loss"])
                if done == self._stop_at:
                    raise KeyboardInterrupt

        yield advance


def test_training_learns_and_is_cached(tmp_path: Path):
    first = Recorder()
    path = train(TINY, CORPUS, tmp_path, first)
    assert first.losses[0] > 4 and first.losses[-1] < 0.75 * first.losses[0]
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.num_hidden_layers == 2 and model.get_input_embeddings().num_embeddings == 259

    again = Recorder()
    assert train(TINY, CORPUS, tmp_path, again) == path
    assert not again.stages, "the second time nothing is trained"
    assert train(replace(TINY, steps=1), CORPUS, tmp_path, Recorder()) != path
    assert train(replace(TINY, steps=1), replace(CORPUS, train=("x = 1\n" * 99,)), tmp_path, Recorder()) != path
    assert len(list(tmp_path.iterdir())) == 3


def test_training_is_the_same_every_time(tmp_path: Path):
    one, two = (train(replace(TINY, steps=5), CORPUS, tmp_path / name, None) for name in ("a", "b"))
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_training_starts_afresh(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(TINY, CORPUS, tmp_path, Recorder(stop_at=3))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("model-")]
    again = Recorder()
    train(TINY, CORPUS, tmp_path, again)
    assert len(again.losses) == TINY.steps


def test_the_whole_demo_at_a_small_size(tmp_path: Path):
    places = {"output": tmp_path / "out", "cache": tmp_path / "cache"}
    rows, sample = run(TINY, LITTLE, **places, progress=NoProgress(), corpus=CORPUS)
    dense, uniform, mixed = rows
    assert dense.density == 1 and dense.kl == 0
    for row, folder in ((uniform, "uniform"), (mixed, "msp")):
        assert 0.23 < row.density <= 0.25
        assert row.kl > 0 and row.perplexity > 1 and row.tokens_per_second > 0
        assert row.disk < dense.disk
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder) is not None
        assert (tmp_path / "out" / folder / "pictures" / "allocation.png").is_file()
    assert (tmp_path / "out" / "msp" / "pictures" / "search.png").is_file()
    patterns = json.loads((tmp_path / "out" / "uniform" / "config.json").read_text())["quantization_config"][
        "allocation"
    ]
    assert set(patterns.values()) == {"2:8"}
    assert sample.startswith(demo.PROMPT) and len(sample) > len(demo.PROMPT)

    recorder = Recorder()
    again, _ = run(TINY, LITTLE, **places, progress=recorder, corpus=CORPUS)
    assert "Training a small model" not in recorder.stages
    assert [(row.kl, row.disk) for row in again] == [(row.kl, row.disk) for row in rows]


def test_the_command_prints_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    seen = {}

    def fake(settings, effort, **options):
        seen.update(options, steps=settings.steps, evaluations=effort.evaluations)
        rows = [Row("dense", 1.0, 0.0, 4.0, 4_000_000, 50.0), Row("MSP [x]", 0.25, 0.5, 6.5, 1_250_000, 40.0)]
        return rows, "def [sample]: pass"

    monkeypatch.setattr(demo, "run", fake)
    monkeypatch.setenv("COLUMNS", "140")
    arguments = ["--output", str(tmp_path / "o"), "--cache", str(tmp_path / "c"), "--steps", "7", "--evaluations", "9"]
    assert demo.main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("25.00%", "6.5", "1.25 MB", "3.20x", "40", "def [sample]: pass", "MSP [x]"):
        assert text in shown
    assert seen["steps"] == 7 and seen["evaluations"] == 9 and seen["output"] == tmp_path / "o"


@pytest.mark.parametrize(
    ("error", "message"), [(KeyboardInterrupt(), "interrupted"), (MspError("no [room]"), "no [room]")]
)
def test_the_command_fails_in_one_line(error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, capsys):
    def fake(*_, **__):
        raise error

    monkeypatch.setattr(demo, "run", fake)
    assert demo.main([]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
