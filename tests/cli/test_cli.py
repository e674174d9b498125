"""The command line, as a user meets it: help, errors, and every verb on a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer.main
from families import VOCABULARY, save, save_text
from transformers import AutoModelForCausalLM
from verbs import SMALL, msp_run, one_object

import msp.session.opened
from msp.base.outputs import MARK
from msp.cli import app
from msp.formats.patterns import Allocation
from msp.plan.decode_table import DecodeTable
from msp.text.token_sets import save_tokens

VERBS = ("prune", "search", "measure", "compare", "sensitivity", "evaluate", "generate", "info", "export")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def text(home: Path) -> Path:
    save_text(home / "text.txt", seed=7)
    return home / "text.txt"


@pytest.fixture(scope="module")
def llama(home: Path) -> Path:
    save("llama", home / "llama")
    return home / "llama"


@pytest.fixture(scope="module")
def packed(home: Path, llama: Path, text: Path) -> tuple[Path, dict]:
    out = home / "packed"
    result = msp_run(
        "prune", llama, "-o", out, "--calibration", text, *SMALL, "--evaluations", 16, "--seed", 3, "--json"
    )
    return out, one_object(result)


def test_help_and_version_do_not_import_torch():
    code = (
        "import sys\nfrom msp.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit as exit: assert not exit.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
    done = subprocess.run([sys.executable, "-m", "msp", "--version"], capture_output=True, text=True)
    assert done.stdout == f"msp {msp.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str):
    shown = msp_run(verb, "--help")
    assert shown.exit_code == 0
    assert "Example: msp" in shown.stdout
    command = typer.main.get_command(app).commands[verb]
    for option in command.params:
        assert option.name == "help" or getattr(option, "help", None), f"{verb} {option.name} has no help"
    assert {"--json", "--debug"} <= {name for option in command.params for name in option.opts}


def test_help_says_that_n_is_kept():
    for arguments in (["--help"], ["prune", "--help"], ["info", "--help"]):
        assert "keeps N of" in " ".join(msp_run(*arguments).stdout.split())


def test_no_verb_shows_the_help():
    shown = msp_run()
    assert "Usage" in shown.stdout + shown.stderr


def test_prune_json(packed: tuple[Path, dict], llama: Path):
    out, data = packed
    assert set(data) >= {
        *("density", "kept", "budget", "allocation", "skipped", "perplexity", "kl", "bytes", "seconds", "peak_memory")
    }
    assert 0.24 < data["density"] <= 0.25
    assert data["budget"] - data["kept"] >= 0
    assert set(data["perplexity"]) == {"dense", "pruned"}
    assert data["bytes"]["packed"] < data["bytes"]["dense"]
    assert Allocation.from_strings(data["allocation"]).kept(_shapes(llama)) == data["kept"]
    assert {path.name for path in (out / "pictures").iterdir()} == {"allocation.png", "sensitivity.png", "search.png"}
    assert not [path for path in out.parent.iterdir() if "search" in path.name], "the search's checkpoint is gone"
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0


def _shapes(model: Path) -> dict[str, tuple[int, int]]:
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    return {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in state.items() if weight.ndim == 2}


def test_search_then_prune(home: Path, llama: Path, text: Path):
    out, common = home / "found", ["--calibration", text, *SMALL]
    budget = ["--budget-bytes", "50kB", "--patterns", "0:8,1:8,2:8,4:8", "--keep", "layers.1.*v_proj=4:8"]
    search = ["search", llama, "-o", out, *common, *budget, "--search-tokens", 3000]
    data = one_object(msp_run(*search, "--json"))
    assert data["objective"] == "bytes" and data["spent"] <= data["budget"] == 50_000
    assert data["history"][-1]["tokens"] >= 3000 and data["allocation"]["model.layers.1.self_attn.v_proj"] == "4:8"
    assert not (home / ".found.search").exists()
    shown = msp_run(*search)
    assert "Tokens forwarded" in shown.stdout and str(out) in shown.stdout, shown.stderr
    for file in ("allocation.json", "recipe.yaml"):
        pruned = one_object(
            msp_run("prune", llama, "-o", home / "by" / file, *common, "--allocation", out / file, "--json")
        )
        assert pruned["allocation"] == data["allocation"]
        assert pruned["bytes"]["packed"] == data["spent"]


def test_several_budgets(home: Path, llama: Path, text: Path):
    out = home / "curve"
    search = ["search", llama, "-o", out, "--sparsity", "0.75, 0.5", "--compliant", "-m", "4", "--evaluations", 16]
    data = one_object(msp_run(*search, "--calibration", text, *SMALL, "--json"))
    assert [(point["name"], point["density"]) for point in data["points"]] == [("0.5", 0.5), ("0.75", 0.25)]
    assert json.loads((out / "pareto.json").read_text()) == data
    assert set(Allocation.load(out / "0.75" / "allocation.json").to_strings().values()) <= {"0:4", "1:4", "2:4"}
    assert sorted(path.name for path in out.iterdir()) == [MARK, "0.5", "0.75", "pareto.json", "pareto.png"]
    assert not (home / ".curve.search").exists()
    assert "Fitness (kl)" in msp_run(*search, "--calibration", text, *SMALL).stdout


def test_a_budget_in_time(home: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    """Measured by one verb, spent by another; and a loss from a module in the current directory."""
    monkeypatch.setattr("msp.evidence.decode_times.SECONDS", 1e-4)
    monkeypatch.chdir(home)
    (home / "my_task_loss.py").write_text("def first(logits, tokens):\n    return -logits[:, :-1, 3].sum()\n")
    table = home / "times.json"
    measured = one_object(msp_run("measure", llama, "-o", table, "--patterns", "0:8,2:8,3:16", "--json"))
    assert measured == json.loads(table.read_text())
    assert {tuple(entry["shape"]) for entry in measured["linears"]} == set(_shapes(llama).values()) - {(VOCABULARY, 32)}
    assert all(set(entry["microseconds"]) == {"dense", "0:8", "2:8", "3:16"} for entry in measured["linears"])
    # Times of so small a model are all alike: these are not.
    for entry in measured["linears"]:
        entry["microseconds"] = {"dense": 20.0, "0:8": 1.0, "2:8": 6.0, "3:16": 5.0}
    table.write_text(json.dumps(measured))
    budget = ["--budget-decode", "100us", "--decode-table", table, "--patterns", "0:8,2:8,3:16,8:8"]
    search = ["search", llama, "-o", home / "timed", *budget, "--fitness", "my_task_loss:first", "--evaluations", 16]
    data = one_object(msp_run(*search, "--calibration", text, *SMALL, "--json"))
    assert data["objective"] == "nanoseconds" and data["spent"] == data["budget"] == 100_000
    assert data["dense_cost"] == 14 * 20_000 and data["recipe"]["fitness"] == "my_task_loss:first"
    shown = msp_run(*search, "--calibration", text, *SMALL).stdout
    assert "0.1 of a budget of 0.1 ms, dense 0.28 ms" in " ".join(shown.split())


def test_a_streamed_search(home: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    """To budgets of every kind, and by a loss of one's own: it finds what a search in memory does."""
    monkeypatch.chdir(home)
    (home / "streamed_loss.py").write_text("def third(logits, tokens):\n    return -logits[:, :-1, 3].sum()\n")
    times = {"dense": 20.0, "0:8": 1.0, "2:8": 6.0, "4:8": 9.0}
    DecodeTable("float32", {}, dict.fromkeys(_shapes(llama).values(), times)).save(Path("streamed.json"))
    load = msp.session.opened.load_model
    for budget in (
        ["--sparsity", "0.75,0.5", "--fitness", "streamed_loss:third"],
        ["--budget-bytes", "50kB"],
        ["--budget-decode", "100us", "--decode-table", "streamed.json", "--patterns", "0:8,2:8,4:8"],
    ):
        search = ["search", llama, *budget, "--evaluations", 16, "--calibration", text, *SMALL, "--json"]
        expected = one_object(msp_run(*search, "-o", home / "whole"))
        monkeypatch.setattr(msp.session.opened, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        found = one_object(msp_run(*search, "-o", home / "streamed", "--stream", "--hidden-bytes", "100kB"))
        monkeypatch.setattr(msp.session.opened, "load_model", load)
        for timed in ("seconds", "peak_memory"):
            found.pop(timed, None), expected.pop(timed, None)
        assert found == expected
    assert not (home / ".streamed.search").exists()


def test_prune_tells_a_reader_what_it_did(home: Path, llama: Path, text: Path):
    out = home / "by-hand"
    shown = msp_run(
        *("prune", llama, "-o", out, "--calibration", text, *SMALL, "--allocator", "uniform", "--no-pictures"),
        *("--pruner", "magnitude", "-s", 0.5, "-m", 4),
    )
    assert shown.exit_code == 0, shown.stderr
    for word in ("Perplexity", "KL to dense", "2:4", "50.00%", "smaller", str(out)):
        assert word in shown.stdout
    assert "Pruning" in shown.stderr and "Pruning" not in shown.stdout
    assert not (out / "pictures").exists()


def test_info_of_packed_and_dense(packed: tuple[Path, dict], llama: Path):
    out, pruned = packed
    data = one_object(msp_run("info", out, "--json"))
    assert data["packed"] is True
    assert data["allocation"] == pruned["allocation"]
    assert data["kept"] == pruned["kept"]
    assert data["recipe"]["seed"] == 3
    shown = msp_run("info", out).stdout
    assert "How it was made" in shown and "wanda" in shown and "All tensors" in shown

    data = one_object(msp_run("info", llama, "--json"))
    assert data["packed"] is False
    assert data["blocks"] == 2
    assert data["parameters"] == AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    down = next(row for row in data["linears"] if row["kind"] == "mlp.down_proj")
    assert down == {
        "kind": "mlp.down_proj",
        "shape": [32, 64],
        "count": 2,
        "weights": 4096,
        "group_sizes": [4, 8, 16, 32],
    }
    assert "mlp.down_proj" in msp_run("info", llama).stdout


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_info_of_other_families(family: str, tmp_path: Path):
    save(family, tmp_path / family)
    data = one_object(msp_run("info", tmp_path / family, "--json"))
    assert data["linears"]
    assert data["skipped"]["lm_head"] == "the output head"
    assert (len(data["skipped"]) > 1) == (family == "mixtral")
    assert msp_run("info", tmp_path / family).exit_code == 0


def test_evaluate(packed: tuple[Path, dict], llama: Path, text: Path):
    out, _ = packed
    common = ["--evaluate", text, "--window", 16, "--test-tokens", 320, "--device", "cpu", "--json"]
    dense = one_object(msp_run("evaluate", llama, *common))
    assert dense["perplexity"] > 1 and dense["tokens"] == 320 and dense["window"] == 16
    pruned = one_object(msp_run("evaluate", out, *common, "--reference", llama))
    assert pruned["kl"] > 0
    same = one_object(msp_run("evaluate", llama, *common, "--reference", llama))
    assert abs(same["kl"]) < 1e-5
    assert same["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    assert "Perplexity" in msp_run("evaluate", llama, *common[:-1]).stdout


def test_generate(packed: tuple[Path, dict], llama: Path):
    for model in (packed[0], llama):
        common = ["generate", model, "w5 w6 w7", "--max-new-tokens", 9, "--device", "cpu"]
        greedy = one_object(msp_run(*common, "--json"))
        assert greedy["tokens"] == 9 and greedy["prompt"] == "w5 w6 w7" and greedy["tokens_per_second"] > 0
        assert one_object(msp_run(*common, "--json", "--seed", 5))["text"] == greedy["text"], "greedy needs no seed"
        sampled = [
            one_object(msp_run(*common, "--json", "--temperature", 5, "--seed", seed))["text"] for seed in (1, 1, 2)
        ]
        assert sampled[0] == sampled[1] != sampled[2]
        shown = msp_run(*common)
        assert shown.stdout.startswith("w5 w6 w7") and "tokens/s" in shown.stderr


def test_generate_stays_inside_the_context(llama: Path):
    data = one_object(msp_run("generate", llama, "w5 " * 60, "--max-new-tokens", 50, "--device", "cpu", "--json"))
    assert data["tokens"] == 4
    failed = msp_run("generate", llama, "w5 " * 64, "--device", "cpu")
    assert failed.exit_code == 1
    assert "64 tokens and fills the model's context of 64" in failed.stderr


def test_compare(home: Path, llama: Path, text: Path):
    picture = home / "rows.png"
    arguments = ["compare", llama, "--calibration", text, *SMALL, "--allocators", "uniform, ramp", "-o", picture]
    data = one_object(msp_run(*arguments, "--pruners", "magnitude,wanda", "--seeds", 2, "--json"))
    rows = data["rows"]
    seen = {(row["allocator"], row["pruner"], row["seed"]) for row in rows}
    assert len(seen) == len(rows) == 12
    for row in rows:
        assert set(row) >= {"allocator", "pruner", "seed", "density", "kl", "perplexity", "evaluations", "seconds"}
        assert (row["spread"] is not None) == (row["seed"] == "mean")
    assert picture.read_bytes().startswith(b"\x89PNG")

    shown = msp_run(*arguments, "--seeds", 2).stdout
    assert "±" in shown and shown.count("uniform") == 1
    every = msp_run(*arguments, "--seeds", 2, "--every-seed").stdout
    assert every.count("uniform") == 3


def test_sensitivity(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["sensitivity", llama, "--calibration", text, "--window", 16, "--calibration-tokens", 64]
    data = one_object(msp_run(*arguments, "--json"))
    assert len(data["traces"]) == 14 and min(data["traces"].values()) > 0
    assert sum(data["blocks"]) == pytest.approx(sum(data["traces"].values()))
    assert (tmp_path / "llama-sensitivity.png").read_bytes().startswith(b"\x89PNG")
    shown = msp_run(*arguments).stdout
    assert "Sensitivity by depth" in shown and "mlp.down_proj" in shown


# Each names what is wrong, leaves with the right code and comes before the model is loaded.
EARLY = [
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "-s", "1"], 2, "sparsity 1 is outside"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "-s", "-0.5"], 2, "outside (0, 1)"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "-s", "half"], 2, "sparsity"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "-m", "5"], 2, "choose one of 4, 8, 16, 32"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--allocator", "best"], 2, "fisher-knapsack"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--pruner", "secateurs"], 2, "sparsegpt"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--fitness", "luck"], 2, "kl, perplexity"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--evaluations", "0"], 2, "at least one"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--device", "abacus"], 2, "abacus"),
    (["prune", "M", "-o", "OUT", "--calibration", "hub:x"], 2, "hub:DATASET"),
    (["prune", "M", "-o", "OUT", "--calibration", "GONE"], 1, "no such file"),
    (["prune", "M", "-o", "OUT", "--calibration", "EMPTY"], 1, "is empty"),
    (["prune", "M", "-o", "OUT", "--calibration", "RECORDS"], 1, "has no field 'text'; it has 'body', 'messages'"),
    (["evaluate", "M", "--evaluate", "BODIES"], 1, "has no field 'bodies'"),
    (["evaluate", "M", "--evaluate", "JSON"], 1, "holds JSON, not prose"),
    (["sensitivity", "M", "--calibration", "M"], 1, "is the folder of a model"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--evaluate", "GONE"], 1, "no such file"),
    (["prune", "M", "-o", "TAKEN", "--calibration", "TEXT"], 1, "exists"),
    (["prune", "M", "--calibration", "TEXT"], 2, "--output"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--allocation", "GONE"], 1, "cannot be read"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--allocation", "EMPTY"], 1, "is no recipe"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--allocation", "GONE", "-s", "0.5"], 2, "one of them"),
    (["search", "M", "--calibration", "TEXT"], 2, "--output"),
    (["search", "M", "-o", "OUT", "--calibration", "TEXT", "--allocator", "best"], 2, "fisher-knapsack"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--budget-bytes", "lots"], 2, "300MB or 1.5GB"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--budget-bytes", "9", "-s", "0.5"], 2, "one of them"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--patterns", "2:8,half"], 2, "not a pattern"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--patterns", "3:8,8:8", "--compliant"], 2, "compliant"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--budget-decode", "12"], 2, "12ms or 800us"),
    (["prune", "M", "-o", "OUT", "--budget-decode", "12ms", "--decode-table", "GONE"], 1, "is not a decode table"),
    (["prune", "M", "-o", "OUT", "--decode-table", "GONE"], 2, "goes with budget_decode"),
    (["prune", "M", "-o", "OUT", "--fitness", "no_module:loss"], 2, "fitness no_module:loss: ModuleNotFoundError"),
    (["compare", "M", "--fitness", "accuracy"], 2, "nor module:function"),
    (["search", "M", "-o", "OUT", "--sparsity", "0.5,0.5"], 2, "more than once"),
    (["search", "M", "-o", "OUT", "--sparsity", "0.5", "--budget-bytes", "1MB"], 2, "one of them"),
    (["search", "M", "-o", "OUT", "--stream", "--pruner", "sparsegpt"], 2, "ask for candidates ranks"),
    (["search", "M", "-o", "OUT", "--stream", "-s", "0.5,0.6", "--workers", "2"], 2, "do not go with stream"),
    (["prune", "M", "-o", "OUT", "--stream", "--workers", "2"], 2, "do not go with stream"),
    (["search", "M", "-o", "OUT", "--sparsity", "half"], 2, "is not a number"),
    (["measure", "M", "-o", "OUT", "--patterns", "3:7"], 2, "4, 8, 16, 32"),
    (["measure", "M", "-o", "OUT", "--device", "abacus"], 2, "abacus"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--keep", "q_proj"], 2, "REGEX=N:M"),
    (["prune", "M", "-o", "OUT", "--colour", "red"], 2, "--colour"),
    (["compare", "M", "--calibration", "TEXT", "--seeds", "0"], 2, "seeds"),
    (["compare", "M", "--calibration", "TEXT", "--allocators", ","], 2, "--allocators names none"),
    (["compare", "M", "--calibration", "TEXT", "--pruners", "ria,ria"], 2, "ria more than once"),
    (["compare", "M", "--calibration", "TEXT", "--allocators", "uniform,best"], 2, "fisher-knapsack"),
    (["compare", "M", "--calibration", "TEXT", "-o", "rows.gif"], 2, "not a .png"),
    (["compare", "M", "--calibration", "TEXT", "-o", "no/such/folder/rows.png"], 1, "there is no folder"),
    (["sensitivity", "M", "--calibration", "GONE"], 1, "no such file"),
    (["evaluate", "M", "--evaluate", "GONE"], 1, "no such file"),
    (["generate", "M", "x", "--max-new-tokens", "0"], 2, "new tokens"),
    (["generate", "M", "x", "--temperature", "-1"], 2, "temperature"),
    (["prun"], 2, "prun"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), EARLY, ids=lambda value: None if isinstance(value, int) else str(value)[:60]
)
def test_wrong_requests_fail_before_the_model_is_loaded(
    arguments: Sequence[str], code: int, message: str, llama: Path, text: Path, tmp_path: Path, monkeypatch
):
    for module in ("msp.session.opened", "msp.verbs.evaluate", "msp.verbs.generate"):
        monkeypatch.setattr(f"{module}.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("x")
    (tmp_path / "empty.txt").touch()
    for name in ("records.json", "json.txt"):
        (tmp_path / name).write_text('[{"body": "w3", "messages": [{"role": "user", "content": "w4"}]}]')
    places = {"M": llama, "OUT": tmp_path / "out", "TEXT": text, "TAKEN": tmp_path / "taken"}
    places |= {"EMPTY": tmp_path / "empty.txt", "GONE": tmp_path / "gone.txt", "JSON": tmp_path / "json.txt"}
    places |= {"RECORDS": tmp_path / "records.json", "BODIES": f"{tmp_path / 'records.json'}:bodies"}
    failed = msp_run(*(places.get(argument, argument) for argument in arguments))
    assert failed.exit_code == code, failed.stderr
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr and not failed.stdout
    assert (tmp_path / "taken" / "precious.txt").read_text() == "x"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("generate", "M", "x"), ("evaluate", "M", "--evaluate", "TEXT")], ids=str)
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MSP_BACKEND", "fortran", "MSP_BACKEND=fortran is not one of cuda, cpu, triton, reference"),
        ("MSP_ISA", "mmx", "MSP_ISA=mmx is not available on this machine; available: "),
    ],
)
def test_a_wrong_variable_is_wrong_usage(variable, value, message, arguments, llama: Path, text: Path, monkeypatch):
    pytest.importorskip("msp._cpu", reason="the compiled module msp._cpu is not built")
    monkeypatch.setenv(variable, value)
    places = {"M": llama, "TEXT": text}
    failed = msp_run(*(places.get(argument, argument) for argument in arguments), *("--device", "cpu"))
    assert failed.exit_code == 2, failed.stderr
    assert message in failed.stderr


LATE = [
    (["prune", "FOLDER", "-o", "OUT", "--calibration", "TEXT"], 1, "no config.json"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--calibration-tokens", "9999"], 1, "is too short"),
    (["prune", "M", "-o", "OUT", "--calibration", "BROKEN"], 1, "not UTF-8 text: byte 3"),
    (["prune", "M", "-o", "OUT", "--calibration", "FOREIGN"], 1, "belong to another model"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--window", "4096"], 2, "longer than the model's context"),
    (["prune", "M", "-o", "OUT", "--calibration", "TEXT", "--unit", "row"], 2, "linear, block"),
    (["prune", "PACKED", "-o", "OUT", "--calibration", "TEXT"], 1, "packed already"),
    (["evaluate", "FOLDER", "--evaluate", "TEXT"], 1, "no config.json"),
    (["generate", "FOLDER", "x"], 1, "no config.json"),
    (["info", "FOLDER"], 1, "no config.json"),
    (["info", "GONE"], 1, "gone.txt"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), LATE, ids=lambda value: None if isinstance(value, int) else str(value)[:60]
)
def test_models_and_texts_that_do_not_serve(
    arguments: Sequence[str], code: int, message: str, llama: Path, text: Path, packed, tmp_path: Path
):
    (tmp_path / "broken.txt").write_bytes(b"w5 \xff")
    save_tokens([1, 2, VOCABULARY] * 999, tmp_path / "foreign.safetensors")
    (tmp_path / "folder").mkdir()
    places = {"M": llama, "OUT": tmp_path / "out", "TEXT": text, "PACKED": packed[0], "GONE": tmp_path / "gone.txt"}
    places |= {"BROKEN": tmp_path / "broken.txt", "FOREIGN": tmp_path / "foreign.safetensors"}
    places |= {"FOLDER": tmp_path / "folder"}
    small = SMALL if arguments[0] == "prune" else []
    failed = msp_run(arguments[0], *small, *(places.get(argument, argument) for argument in arguments[1:]))
    assert failed.exit_code == code, failed.stderr
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr and not failed.stdout
    assert not (tmp_path / "out").exists()


def test_force_replaces_a_model(llama: Path, text: Path, tmp_path: Path):
    arguments = [
        "prune",
        llama,
        "-o",
        tmp_path / "out",
        "--calibration",
        text,
        *SMALL,
        "--allocator",
        "uniform",
        "--json",
    ]
    assert one_object(msp_run(*arguments))["density"] == 0.25
    assert msp_run(*arguments).exit_code == 1
    assert one_object(msp_run(*arguments, "--force", "--sparsity", 0.5))["density"] == 0.5
    assert one_object(msp_run("info", tmp_path / "out", "--json"))["recipe"]["sparsity"] == 0.5
