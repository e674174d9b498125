"""The files beside the weights of a model that its packed form needs too: tokenizer, templates, code, licence."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Files that a tokenizer is read from; those of the second row alone are no tokenizer yet.
VOCABULARIES = ("tokenizer*.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "tekken.json")
BESIDE_VOCABULARIES = ("special_tokens_map.json", "added_tokens.json", "normalizer.json", "chat_template.json")
TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
OTHERS = ("generation_config.json", "*processor_config.json", "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
TRAVELLING = (*VOCABULARIES, *BESIDE_VOCABULARIES, *TEMPLATES, *OTHERS)
# What no pattern above may take along.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that a tokenizer is read from; empty where the model has none."""
    return [file for file in _matching(folder, VOCABULARIES) if file.suffix not in WEIGHTS]


def travel(source: Path, target: Path, tokenizer: Any = None) -> None:
    """Copy to ``target`` what goes with the weights in ``source``; ``target`` keeps what is its own.

    Args:
        tokenizer: as it was read there; its class may name vocabulary files of its own.
    """
    vocabularies = (getattr(tokenizer, "vocab_files_names", None) or {}).values()
    for file in _matching(source, (*TRAVELLING, *vocabularies)):
        place = target / file.relative_to(source)
        if file.suffix in WEIGHTS or place.name in ("config.json", "README.md"):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)  # the content of what a snapshot of the hub only links to


def keep_auto_map(source: Path, target: Path) -> None:
    """Have ``config.json`` in ``target`` name the code files beside it, as that in ``source`` does."""
    entries = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if entries.get("auto_map"):
        edit_config(target, auto_map=entries["auto_map"])


def edit_config(folder: Path, **entries: Any) -> None:
    """Replace ``entries`` of ``config.json`` in ``folder``."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if any(config.get(key) != value for key, value in entries.items()):
        file.write_text(json.dumps(config | entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_to_readers(path: Path) -> None:
    """Give a file, or all files below a folder, the permissions that the umask grants: safetensors grants its owner's.

    Raises:
        OSError: one that cannot be changed.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    probe = (path if path.is_dir() else path.parent) / f".msp-{os.getpid()}.umask"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in files:
        file.chmod(mode)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
