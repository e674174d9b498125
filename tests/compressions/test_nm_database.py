"""The level database: what is in it, on disk and in candidates, and what happens when something goes wrong."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCABULARY, build, save, shared, shared_model, tokens
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import msp
from msp.base.progress import NoProgress
from msp.cli import app
from msp.compressions.nm import NMCompression
from msp.compressions.nm_database import LevelDatabase
from msp.engine import candidates
from msp.engine.candidates import CandidateModel
from msp.errors import MspError, UsageError
from msp.models.as_loaded import StoredDtypes
from msp.models.structure import find_structure
from msp.plan.budget import parse_sparsity
from msp.plan.plans import Goal, PatternRules, make_plan, patterns_of
from msp.pruners import LinearStatistics, get_pruner, sparsegpt
from msp.session.workbench import Workbench
from msp.text.token_sets import TokenSets, save_tokens

SMALL = {"window": 16, "calibration_tokens": 64, "fitness_tokens": 64, "test_tokens": 64, "device": "cpu"}
NAME = "model.layers.1.mlp.up_proj"
LINEARS = 14


def make_bench(
    seed: int = 0,
    *,
    family: str = "llama",
    stored: torch.dtype = torch.float16,
    patterns: str = "0:8,1:8,3:8,2:4,7:16,8:8",
):
    """A tiny model and 8 windows of calibration tokens."""
    model = build(family)
    structure = find_structure(model)
    return Workbench(
        model,
        structure,
        make_plan(structure, Goal(parse_sparsity(0.5)), PatternRules.parse(8, patterns)),
        TokenSets(tokens(8, 32, seed), tokens(4, 32, seed=8), tokens(1, 32, seed=9), 32, {}),
        name="tiny",
        stored=StoredDtypes({}, stored, 0),
        device=torch.device("cpu"),
        progress=NoProgress(),
    )


def hessians(model, windows) -> dict[str, LinearStatistics]:
    """Of every linear, from one plain forward of the dense model."""
    found: dict[str, LinearStatistics] = {}

    def look(name):
        def hook(module, args):
            x = args[0].flatten(0, -2)
            found[name] = LinearStatistics(len(x), hessian=torch.zeros(x.shape[1], x.shape[1]).addmm_(x.T, x))

        return hook

    handles = [linear.module.register_forward_pre_hook(look(linear.name)) for linear in find_structure(model).linears]
    with torch.no_grad():
        model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_level_is_what_the_pruner_gives_in_the_dense_model(stored, family, tmp_path: Path, monkeypatch):
    bench, pruner, factorised = make_bench(family=family, stored=stored), get_pruner("sparsegpt"), []
    inverse = sparsegpt.inverse_cholesky
    monkeypatch.setattr(sparsegpt, "inverse_cholesky", lambda h: factorised.append(len(h)) or inverse(h))
    levels = bench.levels(pruner, tmp_path / "database")
    assert len(factorised) == len(levels) == len(bench.linears)
    statistics = hessians(bench.model, bench.tokens.calibration)
    for linear in bench.linears:
        assert set(map(str, levels[linear.name])) == {"1:8", "3:8", "2:4", "7:16"}
        for pattern, packed in levels[linear.name].items():
            wanted = pruner.prune(linear.weight.contiguous(), statistics[linear.name], pattern)
            assert packed.dtype == stored
            assert torch.equal(packed.values, wanted.values.to(stored))
            assert torch.equal(packed.bitmask, wanted.bitmask)


def dense_weight(model, name: str) -> torch.Tensor:
    """[out, in], in the model's own memory."""
    module = model.get_submodule(name)
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_candidate_is_the_model_with_those_weights(family, tmp_path: Path):
    bench = make_bench(family=family)
    levels = bench.levels(get_pruner("sparsegpt"), tmp_path / "database")
    windows, units = tokens(2, 9, seed=1), bench.plan.units
    dense = copy.deepcopy(bench.model)
    before = bench.model(input_ids=windows).logits
    with (
        CandidateModel(bench.model, bench.structure, NMCompression(bench.structure, levels), units) as candidate,
        torch.no_grad(),
    ):
        for seed in range(4):
            drawn = [np.random.default_rng([seed, i]).integers(0, len(u.levels)) for i, u in enumerate(units)]
            candidate.apply(drawn)
            want = copy.deepcopy(dense)
            for unit, level in zip(units, drawn, strict=True):
                weight, pattern = dense_weight(want, unit.name), patterns_of(unit)[level]
                if pattern.is_empty:
                    weight.zero_()
                elif not pattern.is_dense:
                    weight.copy_(levels[unit.name][pattern].unpack())
            assert torch.equal(candidate.model(input_ids=windows).logits, want(input_ids=windows).logits)
    assert torch.equal(bench.model(input_ids=windows).logits, before)


def test_a_pruner_that_only_selects_finds_the_same_either_way(tmp_path: Path):
    bench, pruner = make_bench(stored=torch.float32), get_pruner("wanda")
    sources = bench.dense_ranks(pruner), bench.levels(pruner, tmp_path / "database")
    windows, found = tokens(2, 9, seed=1), []
    drawn = [np.random.default_rng(i).integers(0, len(unit.levels)) for i, unit in enumerate(bench.plan.units)]
    for source in sources:
        compression = NMCompression(bench.structure, source)
        with CandidateModel(bench.model, bench.structure, compression, bench.plan.units) as candidate:
            candidate.apply(drawn)
            with torch.no_grad():
                found.append(candidate.model(input_ids=windows).logits)
    assert torch.equal(*found)


def test_the_size_is_known_before(tmp_path: Path):
    bench, told = make_bench(), []
    bench.progress = Told(told)
    bench.levels(get_pruner("sparsegpt"), tmp_path / "database")
    files = sorted((tmp_path / "database").glob("*.safetensors"))
    assert len(files) == LINEARS
    # 8 bytes of length and a header of that length come before the tensors.
    content = sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert content == bench.database_bytes
    stage, info = told[0]
    assert stage == "Planning the level database" and info["bytes"] == content and info["to_compute"] == LINEARS
    assert [name for name, _ in told[1:]].count("Level database") == len(told) - 1


class Told(NoProgress):
    """Keeps what every stage was told."""

    def __init__(self, told: list) -> None:
        self._told = told

    def stage(self, name, total=None):
        class Stage:
            def __enter__(_):
                return lambda done, total=None, /, **info: self._told.append((name, info))

            def __exit__(_, *error):
                pass

        return Stage()


def test_what_is_there_is_not_computed_again(tmp_path: Path, monkeypatch):
    pruner, folder = get_pruner("sparsegpt"), tmp_path / "database"
    first = make_bench().levels(pruner, folder)
    (folder / f"{NAME}.safetensors").unlink()
    pruned = []
    levels = sparsegpt.SparseGPTPruner.prune_levels
    monkeypatch.setattr(
        sparsegpt.SparseGPTPruner,
        "prune_levels",
        lambda self, *args, name, **more: pruned.append(name) or levels(self, *args, name=name, **more),
    )
    again = make_bench().levels(pruner, folder, resume=True)
    assert pruned == [NAME]
    assert all(torch.equal(again[NAME][p].values, first[NAME][p].values) for p in first[NAME])
    bench = make_bench()
    monkeypatch.setattr(bench, "_stream", lambda *args, **more: pytest.fail("nothing is missing"))
    bench.levels(pruner, folder)


@pytest.mark.parametrize("other", ["pruner", "calibration tokens", "weights", "dtypes", "levels"])
def test_another_database_is_refused_or_replaced(other: str, tmp_path: Path):
    folder = tmp_path / "database"
    make_bench().levels(get_pruner("sparsegpt"), folder)
    bench = make_bench(
        seed=int(other == "calibration tokens"),
        stored=torch.bfloat16 if other == "dtypes" else torch.float16,
        patterns="0:8,1:8,2:8,8:8" if other == "levels" else "0:8,1:8,3:8,2:4,7:16,8:8",
    )
    if other == "weights":
        bench.model.lm_head.weight.data[3, 5] += 1
    pruner = get_pruner("sparsegpt", percdamp=0.1 if other == "pruner" else 0.01)
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    told = r"pruner .*percdamp=0\.1.*, was .*percdamp=0\.01[^;]*" if other == "pruner" else f"the {other} differ"
    with pytest.raises(MspError, match=f"level database of another run: {told}; start anew without resume$"):
        bench.levels(pruner, folder, resume=True)
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before
    with pytest.warns(UserWarning, match=rf"another run \({told}\): built anew"):
        found = bench.levels(pruner, folder)
    expected = bench.levels(pruner, tmp_path / "fresh")
    for name, levels in expected.items():
        assert all(torch.equal(found[name][pattern].values, packed.values) for pattern, packed in levels.items())


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def _flip_a_bit(file: Path) -> None:
    tensors = load_file(file)
    tensors["3:8.bitmask"][2, 1] ^= 4
    save_file(tensors, file)


def _lose_a_level(file: Path) -> None:
    tensors = load_file(file)
    del tensors["2:4.values"]
    save_file(tensors, file)


def _change_the_dtype(file: Path) -> None:
    save_file(
        {
            name: part.view(torch.bfloat16) if part.is_floating_point() else part
            for name, part in load_file(file).items()
        },
        file,
    )


def _change_the_shape(file: Path) -> None:
    tensors = load_file(file)
    tensors["1:8.values"] = tensors["1:8.values"].t().contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _lose_a_level, _change_the_dtype, _change_the_shape])
def test_a_damaged_file_is_named(damage, tmp_path: Path):
    folder, pruner = tmp_path / "database", get_pruner("sparsegpt")
    make_bench().levels(pruner, folder)
    damage(folder / f"{NAME}.safetensors")
    with pytest.raises(MspError, match=f"{NAME}.safetensors: "):
        make_bench().levels(pruner, folder)


def make_database(folder: Path) -> LevelDatabase:
    pattern = msp.NMPattern(2, 8)
    return LevelDatabase(
        folder,
        {"a": (4, 16), "b": (4, 16)},
        {"a": [pattern], "b": []},
        dict.fromkeys("ab", torch.float16),
        {"model": "x"},
    )


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path: Path, monkeypatch):
    database = make_database(tmp_path / "database")
    assert database.nbytes == 4 * 4 * 2 + 4 * 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 61, 39))
    with pytest.raises(MspError, match="database needs 40 bytes, and 39 are free"):
        database.open()


@pytest.mark.parametrize("content", ["{}", "no json", "[]"])
def test_what_is_no_database_is_left_alone(content: str, tmp_path: Path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(MspError, match=r"manifest\.json is in the way"):
        make_database(tmp_path).open()
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and a text for it."""
    path = tmp_path_factory.mktemp("database")
    save("llama", path / "llama")
    save_tokens(tokens(1, 4096, seed=7, vocabulary=VOCABULARY).flatten(), path / "text.safetensors")
    return path


def options(home: Path, **changes) -> dict:
    asked = {"sparsity": 0.6, "pruner": "sparsegpt", "calibration": str(home / "text.safetensors"), "evaluations": 16}
    return {**asked, **SMALL, **changes}


KILLED = """
import os, signal, sys, json
from pathlib import Path
import msp
replace, written = os.replace, []
def kill(source, target):
    if str(target).endswith(".safetensors"):
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(target)
    replace(source, target)
os.replace = kill
msp.prune(sys.argv[1], work_dir=Path(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def test_a_build_that_was_killed_goes_on(home: Path, tmp_path: Path, monkeypatch):
    arguments = [str(home / "llama"), str(tmp_path / "work"), json.dumps(options(home))]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "database").glob("*.safetensors")}
    assert len(files) == 5
    written = []
    write = LevelDatabase.write
    monkeypatch.setattr(
        LevelDatabase, "write", lambda self, name, found: written.append(name) or write(self, name, found)
    )
    resumed = msp.prune(home / "llama", work_dir=tmp_path / "work", resume=True, **options(home))
    assert len(written) == LINEARS - 5
    assert all(path.stat().st_mtime_ns == before for path, before in files.items())
    whole = msp.prune(home / "llama", **options(home))
    assert len(written) == LINEARS - 5 + LINEARS
    assert (resumed.allocation, resumed.kl, resumed.history) == (whole.allocation, whole.kl, whole.history)


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
def test_both_figures_are_reported(fitness: str, home: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(candidates, "forward_in_bf16", lambda model: False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    asked = options(home, fitness=fitness)
    result = msp.prune(home / "llama", output=tmp_path / "out", **asked)
    assert result.search_fitness["candidate"] == result.history[-1]["best"]
    # Calibrated behind pruned blocks, the linears are others than those of the database.
    assert 0 < abs(result.search_fitness["candidate"] - result.search_fitness["pruned"]) < 1
    assert result.recipe["search_fitness"] == msp.read_info(tmp_path / "out").recipe["search_fitness"]
    assert result.recipe["search"]["database_bytes"] > 0
    ranked = msp.prune(home / "llama", **asked, candidates="ranks")
    assert ranked.recipe["search"]["database_bytes"] is None
    assert ranked.history[0]["best"] != result.history[0]["best"]
    plain = msp.prune(home / "llama", **asked, allocator="uniform")
    assert plain.search_fitness is None and plain.recipe["search"] is None
    del result, ranked
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the temporary folder is gone"


def test_the_figure_after_pruning_is_that_of_the_pruned_model(home: Path, monkeypatch):
    """With one block whatever is calibrated is calibrated in the dense model: both figures are the same."""
    monkeypatch.setattr(candidates, "forward_in_bf16", lambda model: False)
    model = build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    result = msp.prune(model, **options(home, pruner="wanda", candidates="database", dtype="float32", sparsity=0.3))
    assert math.isclose(*result.search_fitness.values(), rel_tol=1e-4)


def test_the_command_line_tells_all_this(home: Path, tmp_path: Path):
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    common = [str(home / "llama"), "--calibration", str(home / "text.safetensors"), "--evaluations", "16", *small]
    runner = CliRunner(env={"COLUMNS": "200"})
    shown = runner.invoke(app, ["prune", *common, "-o", str(tmp_path / "out"), "--pruner", "sparsegpt"])
    assert shown.exit_code == 0, shown.stderr
    assert "as searched, from a database of" in shown.stdout and "pruned block by block" in shown.stdout
    planned, built = (shown.stderr.index(text) for text in ("Planning the level database", "Level database"))
    assert planned < built and "bytes 304,640" in shown.stderr[planned:built]
    shown = runner.invoke(app, ["search", *common, "-o", str(tmp_path / "found"), "--candidates", "database"])
    assert "a database of" in shown.stdout, shown.stderr
    shown = runner.invoke(app, ["search", *common, "-o", str(tmp_path / "none"), "--candidates", "guesses"])
    assert shown.exit_code == 2 and "auto, ranks, database" in shown.stderr


def test_wrong_candidates_are_refused(home: Path):
    with pytest.raises(UsageError, match="candidates 'guesses' is not one of auto, ranks, database"):
        msp.prune(home / "llama", **options(home, candidates="guesses"))


def test_a_real_model():
    """Updated weights are better than the same model's own, and candidates show that."""
    asked = {
        "sparsity": 0.5, "pruner": "sparsegpt", "allocator": "ramp-best", "window": 128, "fitness_tokens": 1024,
        "calibration_tokens": 4096, "test_tokens": 1024, "calibration": str(shared("data", "tinystories-sample.txt")),
    }  # fmt: skip
    found = {
        kind: msp.prune(shared_model("stories260k"), candidates=kind, **asked).search_fitness
        for kind in ("database", "ranks")
    }
    assert found["database"]["candidate"] < 0.95 * found["ranks"]["candidate"]
