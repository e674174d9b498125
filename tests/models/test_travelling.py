"""What goes with the weights of a model: its tokenizer, templates, processors, code and licence."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, build, save, tokenizer, tokens
from transformers import AutoTokenizer

import msp
from msp import evaluate
from msp.base.outputs import MARK
from msp.errors import MspError
from msp.models.loading import load_model
from msp.models.stored import load_stored
from msp.text.token_sets import save_tokens


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_tokens(tokens(1, 4000, seed=1)[0], path)
    return {"sparsity": 0.5, "allocator": "uniform", "calibration": str(path), **SMALL}


def _pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")


def _truncate(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])


def _truncate_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class":')


def _settings_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _empty_class(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def _sentencepiece(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (_pointer, r"tokenizer\.json is a pointer of git-lfs.*git lfs pull"),
        (_truncate, r"line \d+ column \d+"),
        (_truncate_settings, r"line 1 column \d+"),
        (_settings_alone, r"settings \(tokenizer_config\.json\), but no file with a vocabulary"),
        (_empty_class, r"settings \(tokenizer_config\.json\), but no vocab\.json or merges\.txt"),
        (_sentencepiece, r"sentencepiece, which is not installed" if find_spec("sentencepiece") is None else r"\w+"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_an_error_with_its_reason(
    damage: Callable[[Path], None], reason: str, options: dict[str, Any], tmp_path: Path
) -> None:
    save("llama", tmp_path / "dense")
    damage(tmp_path / "dense")
    loads: list[Callable[[], Any]] = [
        lambda: load_model(tmp_path / "dense"),
        lambda: load_stored(tmp_path / "dense", device=torch.device("cpu")),
        lambda: msp.prune(tmp_path / "dense", output=tmp_path / "out", **options),
        lambda: evaluate(tmp_path / "dense", evaluate=options["calibration"], window=16),
    ]
    for load in loads:
        with pytest.raises(MspError, match=f"the tokenizer cannot be read: .*{reason}") as error:
            load()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_pointers_of_git_lfs_are_named_so(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    with pytest.raises(MspError, match=r"model\.safetensors: a pointer of git-lfs"):
        load_model(tmp_path)


TRAVELS = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "preprocessor_config.json": '{"image_size": 224}',
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "special_tokens_map.json": "{}",
    "LICENSE": "as is",
    "NOTICE.txt": "of whom",
}
STAYS = {
    "pytorch_model.bin": "weights",
    "consolidated.safetensors": "weights",
    "training_args.json": "{}",
    "train.py": "raise SystemExit",
    "README.md": "of the dense model",
    "model.safetensors.index.json.bak": "{}",
    "original/params.json": "{}",
}


@pytest.mark.parametrize("streamed", [False, True])
def test_what_goes_with_the_weights_travels(streamed: bool, options: dict[str, Any], tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    save("llama", dense)
    for name, content in (TRAVELS | STAYS).items():
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(content)
    # what save_pretrained would write otherwise
    settings = json.loads((dense / "tokenizer_config.json").read_text()) | {"of_our_own": [1, 2]}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    msp.prune(dense, output=out, stream=streamed, **options)
    for name in (*TRAVELS, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (dense / name).read_bytes(), name
    for name in STAYS:
        assert name == "README.md" or not (out / name).exists(), name
    assert "of the dense model" not in (out / "README.md").read_text()
    assert load_model(out).tokenizer("w7 w8").input_ids == [7, 8]
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(dense).chat_template


def test_a_model_object_takes_along_what_it_is_given(options: dict[str, Any], tmp_path: Path) -> None:
    msp.prune(build("llama"), tokenizer=tokenizer(), output=tmp_path / "with", **options)
    assert load_model(tmp_path / "with").tokenizer("w7 w8").input_ids == [7, 8]
    msp.prune(build("llama"), output=tmp_path / "without", **options)
    assert load_model(tmp_path / "without").tokenizer is None


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("streamed", [False, True])
def test_files_are_open_to_whom_the_umask_says(
    umask: int, mode: int, streamed: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    save("llama", tmp_path / "dense")
    before = os.umask(umask)
    try:
        msp.prune(tmp_path / "dense", output=tmp_path / "out", stream=streamed, **options)
        save_tokens([1, 2], tmp_path / "tokens.safetensors")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 4
    for file in [*files, tmp_path / "tokens.safetensors"]:
        assert stat.S_IMODE(file.stat().st_mode) == mode, file
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode | (mode & 0o444) >> 2
    assert [path.name for path in (tmp_path / "out").glob(".msp-*")] == [MARK]


def test_a_hub_id_is_read_as_its_snapshot(options: dict[str, Any], tmp_path: Path) -> None:
    """Offline, from a cache as the hub's client lays it out."""
    repository = tmp_path / "hub" / "models--somebody--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    model = save("llama", snapshot, dtype=torch.bfloat16)
    (snapshot / "model.safetensors").unlink()
    model.save_pretrained(snapshot, max_shard_size="20KB")
    (snapshot / "LICENSE").write_text("as is")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for extra in ((), ("--stream",)):
        arguments = ["prune", "somebody/tiny", "-o", tmp_path / "out", "--calibration", options["calibration"]]
        arguments += ["--allocator", "uniform", "--window", 16, "--calibration-tokens", 64, "--test-tokens", 64]
        arguments += ["--fitness-tokens", 64, "--no-pictures", "--json", "--force", "--device", "cpu", *extra]
        command = [sys.executable, "-m", "msp", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["bytes"]["dense"] == sum(tensor.nbytes for tensor in model.state_dict().values())
        assert (tmp_path / "out" / "LICENSE").read_text() == "as is"
        assert not (tmp_path / "out" / "LICENSE").is_symlink()
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_a_link_out_of_the_model_is_not_copied(options: dict[str, Any], tmp_path: Path) -> None:
    """A model from elsewhere gets no file of this machine; a tokenizer that lies elsewhere is saved as it was read."""
    save("llama", tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "model" / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "model" / "NOTICE").write_text("theirs")
    (tmp_path / "model" / "NOTICE.txt").symlink_to("NOTICE")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).rename(tmp_path / name)
        (tmp_path / "model" / name).symlink_to(tmp_path / name)
    with pytest.warns(UserWarning, match="LICENSE is a link that leads out of") as told:
        msp.prune(tmp_path / "model", output=tmp_path / "out", **options)
    assert sum("leads out of" in str(warning.message) for warning in told) == 3
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert (tmp_path / "out" / "NOTICE.txt").read_text() == "theirs"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7 w9")["input_ids"] == [7, 9]
