"""Writing packed checkpoints: what is in them, and that they appear whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, llama_like, pack, packed_model, same_state, save, tokenizer
from folders import contents, listing, small_files
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from msp.base import staging
from msp.base.outputs import MARK, check_output
from msp.base.safetensors_files import tensor_files
from msp.engine.evolution import UNLIMITED
from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.formats.storage import Storage
from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.info import LinearInfo, read_info, validate_packed
from msp.packed.sparse_linear import SparseLinear
from msp.show.report import packed_report

RECIPE: dict[str, Any] = {
    "model": "someone/some-model",
    "sparsity": 0.75,
    "group_size": 8,
    "allocator": "msp",
    "pruner": "wanda",
    "seed": 3,
    "calibration": {"source": "text.txt", "tokens": 4096, "window": 128},
    "perplexity": {"dense": 12.25, "pruned": 19.5, "tokens": 2048},
    "kl": 0.31,
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture
def model() -> PreTrainedModel:
    return packed_model("llama-tied", seed=1)


def test_writes_a_model_directory_and_nothing_beside_it(model: PreTrainedModel, tmp_path: Path) -> None:
    written = save_packed(model, tokenizer(), tmp_path / "deep" / "out", recipe=RECIPE)
    assert written == tmp_path / "deep" / "out"
    assert listing(tmp_path) == ["deep"] and listing(tmp_path / "deep") == ["out"]
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        listing(written)
    )
    assert not [name for name in listing(written) if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert AutoTokenizer.from_pretrained(written)("w5 w6").input_ids == [5, 6]


def test_config_names_every_pattern_shape_and_the_recipe(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe=RECIPE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "msp" and config["format"] == 1 and config["recipe"] == RECIPE
    assert set(config["versions"]) == {"msp", "torch", "transformers"}
    assert config["allocation"]["model.layers.0.self_attn.q_proj"] == "2:8"
    assert config["allocation"]["model.layers.0.self_attn.o_proj"] == "8:8"
    assert config["shapes"]["model.layers.1.mlp.down_proj"] == [32, 64]
    assert len(config["allocation"]) == len(config["shapes"]) == 14


def test_tensors_are_those_of_the_format(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe={})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    info = read_info(tmp_path / "out")
    expected_bytes = 0
    for linear in info.linears:
        rows, columns = linear.shape
        if linear.pattern.is_dense:
            assert stored[f"{linear.name}.weight"].shape == (rows, columns)
            assert linear.packed_bytes == linear.dense_bytes == rows * columns * 4
            continue
        values, bitmask = stored[f"{linear.name}.values"], stored[f"{linear.name}.bitmask"]
        assert stored[f"{linear.name}.weight"].shape == (0,)
        assert values.shape == (rows, columns // linear.pattern.m * linear.pattern.n)
        assert bitmask.shape == (rows, math.ceil(columns / 8)) and bitmask.dtype == torch.uint8
        assert linear.packed_bytes == values.nbytes + bitmask.nbytes
        assert linear.packed_bytes == 4 * linear.pattern.kept(rows, columns) + rows * math.ceil(columns / 8)
        expected_bytes += values.nbytes + bitmask.nbytes
    packed = [linear for linear in info.linears if not linear.pattern.is_dense]
    assert sum(linear.packed_bytes for linear in packed) == expected_bytes
    assert info.packed_bytes + info.other_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert info.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored


def test_info_tells_the_whole_without_loading(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe=RECIPE)
    info = read_info(tmp_path / "out")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    for name, module in modules.items():
        assert info.allocation[name] == module.pattern
    assert info.recipe == RECIPE
    assert info.weights == sum(rows * columns for rows, columns in (linear.shape for linear in info.linears))
    assert info.kept == sum(linear.pattern.kept(*linear.shape) for linear in info.linears)
    assert info.dense_bytes == 4 * info.weights
    assert json.loads(json.dumps(info.to_dict()))["kept"] == info.kept


def test_info_tells_what_a_gpu_unpacks(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe=RECIPE)
    info = read_info(tmp_path / "out")
    assert not any(linear.fast_prefill_bytes for linear in info.linears)  # float32, and smaller than a tile

    def linear(pattern: str, rows: int = 4096, columns: int = 4096, dtype: str = "BF16") -> LinearInfo:
        dense = rows * columns * (2 if dtype == "BF16" else 4)
        return LinearInfo("layers.0.up", Storage.parse(pattern), (rows, columns), dtype, dense // 3, dense)

    found = [linear(pattern).fast_prefill_bytes for pattern in ("2:8", "5:8", "7:8", "8:8", "0:8")]
    assert found == [4096 * 4096 * 9 // 8, 4096 * 4096 * 2, 0, 0, 0]
    assert linear("2:8", columns=4104).fast_prefill_bytes == linear("2:8", dtype="F32").fast_prefill_bytes == 0
    # a number of tokens wherever packing costs time, which is where prefill keeps something else
    patterns = ("2:8", "5:8", "7:8", "5:16")
    slower = {pattern: linear(pattern).slower_from_tokens for pattern in patterns}
    assert all((tokens > 1) == bool(linear(pattern).fast_prefill_bytes) for pattern, tokens in slower.items())
    shown = dataclasses.replace(info, linears=tuple(map(linear, patterns)))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(packed_report(shown))
    text = console.export_text()
    assert "1 linears save too little" in text and "unpacked once" in text
    plainly = " ".join(text.split())
    assert "long prompts are slower than with dense weights, by calculation (not measured)" in plainly
    for tokens, count in Counter(filter(None, slower.values())).items():
        assert f"{count} linears from about {tokens} tokens on" in plainly
    assert "msp.fast_prefill(model) unpacks once" in plainly
    assert "takes up to 85.98 MB more there, beside the 33.55 MB of these linears" in plainly


@pytest.mark.parametrize(("generations", "told"), [(30, "30"), (UNLIMITED, "until the tokens are spent")])
def test_info_tells_how_long_the_search_was_to_go_on(
    model: PreTrainedModel, tmp_path: Path, generations: int, told: str
) -> None:
    save_packed(model, None, tmp_path / "out", recipe={"search": {"generations": generations}})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(packed_report(read_info(tmp_path / "out")))
    (line,) = [line for line in console.export_text().splitlines() if "search: generations" in line]
    assert line.split("generations")[1].strip() == told


def test_info_counts_blocks_as_numbers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(llama_like("LlamaConfig", num_hidden_layers=11, intermediate_size=32)())
    replace_linears(model, pack(model, ["2:4"]))
    save_packed(model, None, tmp_path / "out", recipe={})
    blocks = [int(linear.name.split(".")[2]) for linear in read_info(tmp_path / "out").linears]
    assert blocks == sorted(blocks) and blocks[-1] == 10


@pytest.mark.parametrize("shard", [20_000, "9KB", 1_000])
def test_shards(model: PreTrainedModel, tmp_path: Path, shard: int | str) -> None:
    save_packed(model, None, tmp_path / "out", recipe=RECIPE, max_shard_size=shard)
    save_packed(model, None, tmp_path / "whole", recipe=RECIPE)
    files = tensor_files(tmp_path / "out")
    assert len(files) > 1 and not (tmp_path / "out" / "model.safetensors").exists()
    limit = int(str(shard).replace("KB", "000"))
    for file in files:
        stored = load_file(file)
        assert len(stored) == 1 or sum(tensor.nbytes for tensor in stored.values()) <= limit
    sharded, whole = validate_packed(tmp_path / "out"), validate_packed(tmp_path / "whole")
    assert sharded.linears == whole.linears and sharded.other_bytes == whole.other_bytes
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(loaded, model)


def test_a_missing_shard_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe={}, max_shard_size=20_000)
    lost = tensor_files(tmp_path / "out")[1]
    lost.unlink()
    with pytest.raises(MspError, match=lost.name):
        read_info(tmp_path / "out")
    with pytest.raises(MspError, match=lost.name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_refuses_what_exists_without_force(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_packed(model, tokenizer(), out, recipe={})
    before = contents(out)
    with pytest.raises(MspError, match=r"out exists already.*force"):
        save_packed(model, None, out, recipe=RECIPE)
    assert contents(out) == before


def test_force_replaces_a_model_and_leaves_nothing_of_it(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_packed(model, tokenizer(), out, recipe={}, max_shard_size=20_000)
    (out / "note.txt").write_text("mine")
    with pytest.raises(MspError, match=r"note\.txt.*move that away"):
        save_packed(packed_model("qwen2", seed=2), None, out, recipe=RECIPE, force=True)
    (out / "note.txt").unlink()
    save_packed(packed_model("qwen2", seed=2), None, out, recipe=RECIPE, force=True)
    assert listing(tmp_path) == ["out"]
    files = {"README.md", "config.json", "generation_config.json", "load_with_msp.py", "model.safetensors"}
    assert set(listing(out)) == {MARK, *files}
    assert read_info(out).recipe == RECIPE


def test_force_does_not_replace_what_is_no_model(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    for name in ("out", "file"):
        with pytest.raises(MspError, match=f"{name} exists and is not a model"):
            save_packed(model, None, tmp_path / name, recipe={}, force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years" and (tmp_path / "file").read_text() == "text"


def test_force_takes_an_empty_directory_and_follows_a_link(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert save_packed(model, None, tmp_path / "link", recipe={}, force=True) == tmp_path / "real"
    assert (tmp_path / "link").is_symlink() and read_info(tmp_path / "link").weights


def test_output_is_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert listing(tmp_path) == ["file"]
    with pytest.raises(MspError, match="file"):
        check_output(tmp_path / "file" / "out")
    if Path("/proc/self").exists():  # no permission bit tells root so, but nothing can be made there
        with pytest.raises(MspError, match="/proc"):
            check_output("/proc/out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where the permission bits forbid it")
def test_an_unwritable_parent_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(MspError, match="cannot be written"):
            check_output(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)


def test_a_dense_model_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(MspError, match="no packed linears"):
        save_packed(build("llama"), None, tmp_path / "out", recipe={})
    assert not listing(tmp_path)


class Breaks:
    """A tokenizer that writes half a file and then fails: by then the weights are on disk."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("{")
        raise self.error


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), MspError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (RuntimeError("unforeseen"), MspError),  # tokenizers have no kind of error for a full disk
]


@pytest.mark.parametrize("failure, raised", FAILURES, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_and_the_old_model_intact(
    model: PreTrainedModel, tmp_path: Path, existing: bool, failure: BaseException, raised: type[BaseException]
) -> None:
    out = tmp_path / "out"
    if existing:
        save_packed(packed_model("qwen2"), tokenizer(), out, recipe=RECIPE)
    before = contents(out) if existing else None
    with pytest.raises(raised):
        save_packed(model, Breaks(failure), out, recipe={}, force=existing)
    assert listing(tmp_path) == (["out"] if existing else [])
    assert not existing or contents(out) == before


@pytest.mark.parametrize("failing", ["exchange", "first", "second", "sync"])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["io", "key"])
def test_a_failure_in_the_swap_puts_the_old_model_back(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, failing: str
) -> None:
    """In the exchange, or in the first or second rename where there is none."""
    out = tmp_path / "out"
    save_packed(packed_model("qwen2"), tokenizer(), out, recipe=RECIPE)
    before, rename = contents(out), os.rename

    def fails(*_: object) -> bool:
        raise failure

    def fails_once(source: Path, target: Path) -> None:
        to_old = Path(target).name == "old"
        if (failing == "first") == to_old and Path(source).name != "old":
            raise failure
        rename(source, target)

    if failing == "sync":
        monkeypatch.setattr(os, "fsync", fails)
    elif failing == "exchange":
        monkeypatch.setattr(staging, "exchange", fails)
    else:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
        monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises((MspError, KeyboardInterrupt)):
        save_packed(model, None, out, recipe={}, force=True)
    monkeypatch.undo()
    assert listing(tmp_path) == ["out"] and contents(out) == before


def test_a_full_disk_is_an_error_and_leaves_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    with small_files(), pytest.raises(MspError, match="out cannot be written"):
        save_packed(model, None, tmp_path / "out", recipe={})
    assert not listing(tmp_path)


def test_a_recipe_that_json_cannot_hold_fails_before_writing(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_packed(model, None, tmp_path / "out", recipe={"model": object()})
    assert not listing(tmp_path)


def test_infinite_figures_stay_valid_json(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe={"perplexity": {"pruned": math.inf}, "kl": math.nan})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    config = json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=refuse)
    assert config["quantization_config"]["recipe"] == {"perplexity": {"pruned": "inf"}, "kl": "nan"}


def test_generation_config_survives(model: PreTrainedModel, tmp_path: Path) -> None:
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.625
    save_packed(model, None, tmp_path / "out", recipe={})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.625


def test_model_card_has_front_matter_sizes_recipe_and_figures(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe=RECIPE)
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: transformers" in front and "- msp\n- nm-sparsity" in front
    assert 'base_model: "someone/some-model"' in front
    info = read_info(tmp_path / "out")
    for needed in (
        f"# some-model, {1 - info.kept / info.weights:.1%} pruned",
        "import msp",
        f"{info.packed_bytes:,}",
        f"{info.dense_bytes:,}",
        "| 2:8 |",
        "wanda",
        "19.5",
    ):
        assert needed in card, needed


@pytest.mark.parametrize(
    "recipe", [{}, {"model": "/some/where/llama"}, {"perplexity": 3.5, "note": "a|b\nc", "calibration": None}]
)
def test_model_card_copes_with_a_sparse_recipe(model: PreTrainedModel, tmp_path: Path, recipe: dict[str, Any]) -> None:
    save_packed(model, None, tmp_path / "out", recipe=recipe)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card and "## Size" in card and "None" not in card
    assert ("3.5" in card) == ("perplexity" in recipe)
    assert ("of `llama`" in card) == ("model" in recipe) and "/some/where" not in card
    assert all(line.endswith("|") for line in card.splitlines() if line.startswith("|"))


def test_reads_only_packed_models(tmp_path: Path) -> None:
    save("llama", tmp_path / "dense")
    for path, message in ((tmp_path, "no config.json"), (tmp_path / "dense", "not a packed model")):
        for read in (read_info, validate_packed):
            with pytest.raises(MspError, match=message):
                read(path)


def test_validation_reads_every_group(model: PreTrainedModel, tmp_path: Path) -> None:
    save_packed(model, None, tmp_path / "out", recipe={})
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.bitmask"
    tensors[name] = tensors[name].clone()
    tensors[name][-1, -1] ^= 1 << 7
    save_file(tensors, file, metadata={"format": "pt"})
    read_info(tmp_path / "out")
    with pytest.raises(MspError, match=r"model\.layers\.1\.self_attn\.q_proj") as raised:
        validate_packed(tmp_path / "out")
    assert not isinstance(raised.value, UsageError)


def test_odd_input_sizes_are_told_exactly(tmp_path: Path) -> None:
    """12 columns are a byte and a half of bitmask; an empty linear's values cannot tell 12 from 16."""
    torch.manual_seed(0)
    config = llama_like("LlamaConfig", intermediate_size=12)()
    model = AutoModelForCausalLM.from_config(config).eval()
    replace_linears(model, pack(model, ["0:4"]))
    save_packed(model, None, tmp_path / "out", recipe={})
    info = {linear.name: linear for linear in validate_packed(tmp_path / "out").linears}
    down = info["model.layers.0.mlp.down_proj"]
    assert down.shape == (32, 12) and down.pattern == NMPattern(0, 4)
    assert down.packed_bytes == 32 * 2 and down.dense_bytes == 32 * 12 * 4
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
