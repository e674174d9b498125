"""The documents for people, and what is code, prose and a link in them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(
        path
        for folder in ("docs", "examples", "benchmarks", ".github")
        for path in sorted((ROOT / folder).rglob("*.md"))
    ),
]
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def document_name(document: Path) -> str:
    """The path of a document from the root, as a name for a test."""
    return document.relative_to(ROOT).as_posix()


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return [code for found, code in _BLOCK.findall(text) if found == language]


def prose(text: str) -> str:
    """The text without its code blocks."""
    return _BLOCK.sub("", text)


def code_words(text: str) -> list[str]:
    """The words of inline code, and of commands, without the punctuation around them."""
    pieces = [*re.findall(r"`([^`\n]+)`", prose(text)), *blocks(text, "bash")]
    return [word.strip("'\"(),;:") for piece in pieces for word in piece.split()]


def anchors(text: str) -> set[str]:
    """What a link to a heading names, as the repository's host derives it from the heading."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        found.add(re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-"))
    return found


def example(name: str) -> str:
    """The code of an example in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    match = re.search(rf"<!-- example:{name} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert match, name
    code = match[1]
    assert len(code.splitlines()) < 60
    return code


def load(name: str, code: str, folder: Path) -> ModuleType:
    """Import ``code`` as module ``name``, from a file: Triton reads a kernel's source from there."""
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
