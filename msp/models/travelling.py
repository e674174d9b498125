"""The files beside the weights of a model that its packed form needs too: tokenizer, templates, code, licence."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msp.base.reading import file_inside, read_object
from msp.errors import MspError

# Files that a tokenizer is read from; those of the second row alone are no tokenizer yet.
VOCABULARIES = ("tokenizer*.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "tekken.json")
BESIDE_VOCABULARIES = ("special_tokens_map.json", "added_tokens.json", "normalizer.json", "chat_template.json")
TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
CODE = ("*.py", "custom_generate/*")
OTHERS = ("generation_config.json", "*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
TRAVELLING = (*VOCABULARIES, *BESIDE_VOCABULARIES, *TEMPLATES, *OTHERS, *CODE)
# What no pattern above may take along.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that a tokenizer is read from; empty where the model has none."""
    return [file for file in _matching(folder, VOCABULARIES) if file.suffix not in WEIGHTS]


def tokenizer_travels(folder: Path) -> bool:
    """Whether ``travel`` copies all of the tokenizer in ``folder``."""
    files = tokenizer_files(folder)
    return bool(files) and all(_is_inside(folder, file) for file in files)


def has_vocabulary(folder: Path, tokenizer: Any = None) -> bool:
    """Whether ``folder`` has more of a tokenizer than its settings, or all that ``tokenizer`` reads.

    transformers makes an empty tokenizer of settings alone.
    """
    wanted = (getattr(tokenizer, "vocab_files_names", None) or {}).values() if tokenizer is not None else None
    if wanted is not None and not wanted:  # bytes or characters, say
        return True
    return any(file.name != "tokenizer_config.json" for file in tokenizer_files(folder)) or any(
        (folder / name).is_file() for name in wanted or ()
    )


def travel(source: Path, target: Path, tokenizer: Any = None) -> None:
    """Copy to ``target`` what goes with the weights in ``source``; ``target`` keeps what is its own.

    A link that leads out of ``source`` is left out with a warning: a model from elsewhere could have any file of this
    machine copied, and published with it.

    Args:
        tokenizer: as it was read there; its class may name vocabulary files of its own.
    """
    vocabularies = (getattr(tokenizer, "vocab_files_names", None) or {}).values()
    patterns = [pattern for pattern in TRAVELLING if pattern not in CODE or _names_code(source)]
    for file in _matching(source, (*patterns, *vocabularies)):
        if not _is_inside(source, file):
            warnings.warn(f"{file} is a link that leads out of {source}: it is not copied", stacklevel=2)
            continue
        place = target / file.relative_to(source)
        if file.suffix in WEIGHTS or place.name in ("config.json", "README.md"):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)  # the content of what a snapshot of the hub only links to


def keep_auto_map(source: Path, target: Path) -> None:
    """Have ``config.json`` in ``target`` name the code files beside it, as that in ``source`` does."""
    entries = read_object(source / "config.json", foreign=True)
    if entries.get("auto_map"):
        edit_config(target, auto_map=entries["auto_map"])


def edit_config(folder: Path, **entries: Any) -> None:
    """Replace ``entries`` of ``config.json`` in ``folder``."""
    file = folder / "config.json"
    config = read_object(file, foreign=True)
    if any(config.get(key) != value for key, value in entries.items()):
        file.write_text(json.dumps(config | entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _names_code(folder: Path) -> bool:
    """Whether Python files in ``folder`` are a part of the model, and not there by chance."""
    told = [folder / "config.json", folder / "tokenizer_config.json", *folder.glob("*processor_config.json")]
    named = any(file.is_file() and b'"auto_map"' in file.read_bytes() for file in told)
    return named or (folder / "custom_generate").is_dir()


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _is_inside(folder: Path, file: Path) -> bool:
    """Whether ``file`` is in ``folder``, also when links are followed, or in the hub's cache of the same model."""
    try:
        file_inside(folder, str(file.relative_to(folder)), str(folder))
    except MspError:
        return False
    return True
