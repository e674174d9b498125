"""Everything that a document names is there: links, headings, paths, options, variables, targets, names, extras."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest
import typer.main
from documents import DOCUMENTS, ROOT, anchors, code_words, document_name, prose, read

from msp.cli import app
from msp.ops._dispatch import ISAS

FOLDERS = "msp|triton_kernels|csrc|tests|benchmarks|docs|examples|[.]ci|[.]github"
PATH = re.compile(rf"(?:{FOLDERS})/[\w./*<>-]*")
SOURCES = (".py", ".cpp", ".h", ".cu", ".txt", ".toml")
# CONTRIBUTING shows how to write these.
INVENTED = re.compile(r"/(?:nm_energy|balanced|ends|scaling|fp8_values)\.(?:py|cpp|cu)$")
# A run writes these.
WRITTEN = re.compile(r"^benchmarks/results/gpu-check-")
# Of other programs than msp.
FOREIGN = {
    "--model",
    "--model_args",
    "--tasks",
    "--strict",
    "--no-build-isolation",
    "--no-deps",
    "--editable",
    "--force-reinstall",
}

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=document_name)


@functools.cache
def source_files() -> list[Path]:
    """Every source file of the project."""
    folders = [ROOT / name for name in ("msp", "triton_kernels", "csrc", "tests", "benchmarks", "examples", ".ci")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES]
    return [
        *found,
        *(path for path in ROOT.iterdir() if path.suffix in SOURCES),
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
    ]


@functools.cache
def source_text() -> str:
    own = Path(__file__)
    return "\n".join(path.read_text(encoding="utf-8") for path in source_files() if path.resolve() != own)


@functools.cache
def options() -> set[str]:
    """The options of all verbs of the command line."""
    verbs = typer.main.get_command(app).commands.values()
    return {name for verb in verbs for given in verb.params for name in (*given.opts, *given.secondary_opts)}


@every_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(read(document))):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not heading or heading in anchors(read(target)), link


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s:]+\.md)(?:#[^)]*)?\)", prose(read(page)))
        waiting += {(page.parent / link).resolve() for link in links} - reached
    assert {page for page in DOCUMENTS if ".github" not in page.parts} <= reached


@every_document
def test_paths_are_there(document: Path) -> None:
    for word in code_words(read(document)):
        path = PATH.fullmatch(word)
        if path and not INVENTED.search(word) and not WRITTEN.match(word):
            assert list(ROOT.glob(re.sub(r"<\w+>", "*", word).rstrip("/"))), word
        elif re.fullmatch(r"[\w*]+\.(?:py|cpp|cu|h|md)", word):  # a file without its folder
            known = any(source.match(word) for source in (*source_files(), *DOCUMENTS))
            assert known or f'"{word}"' in source_text(), word


@every_document
def test_options_are_there(document: Path) -> None:
    for word in code_words(read(document)):
        if re.match(r"--[a-z]", word):
            option = re.split(r"[=|]", word)[0]
            assert option in options() | FOREIGN or f'"{option}"' in source_text(), word


@every_document
def test_variables_of_the_environment_are_there(document: Path) -> None:
    for name in set(re.findall(r"\bMSP_[A-Z_]+", read(document))):
        assert re.search(rf"\b{name}\b", source_text()), name


@every_document
def test_names_of_the_package_are_there(document: Path) -> None:
    for word in code_words(read(document)):
        name = re.match(r"msp(?:\.[A-Za-z_]\w*)+", word)
        if name is None:
            continue
        parts = name[0].split(".")
        found = importlib.import_module("msp")
        for index, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:index]))
            found = getattr(found, part)


@every_document
def test_make_targets_are_there(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    text = read(document)
    for named in [
        *re.findall(r"^make ([a-z -]+?)\s*(?:[A-Z#].*)?$", text, re.MULTILINE),
        *re.findall(r"`make ([a-z-]+)", text),
    ]:
        assert set(named.split()) <= targets, named


def test_every_module_has_a_room() -> None:
    table = read(ROOT / "CONTRIBUTING.md")
    for path in sorted((ROOT / "msp").iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"`msp/{path.name}`" in table, path.name
        elif (path / "__init__.py").is_file() and not path.is_symlink():
            assert f"`msp/{path.name}/`" in table, path.name


def test_every_extra_is_named_where_it_is_needed() -> None:
    (extras,) = re.findall(r"\[project.optional-dependencies\]\n(.*?)\n\n", read(ROOT / "pyproject.toml"), re.DOTALL)
    names = set(re.findall(r"^([\w-]+) = \[", extras, re.MULTILINE)) - {"dev"}
    text = "".join(map(read, DOCUMENTS))
    assert names == set(re.findall(r"mixed-sparsity-pruning\[([\w-]+)\]", text))
    assert names >= set(re.findall(r"mixed-sparsity-pruning\[([\w-]+)\]", source_text()))
    for name in names:
        module = {"hub": "datasets", "recover": "accelerate"}.get(name, name.replace("-", "_"))
        assert re.search(rf"^\s*(?:import|from) {module}\b|import_module\(\"{module}\"\)", used(), re.MULTILINE), name


def used() -> str:
    """What users run: the package and the examples."""
    return "\n".join(read(path) for folder in ("msp", "examples") for path in (ROOT / folder).rglob("*.py"))


def test_pages_that_the_code_names_are_there() -> None:
    for name in set(re.findall(r"\b(?:docs|examples)/[\w/-]+\.(?:md|py|png)\b", source_text())):
        assert (ROOT / name).exists(), name


def test_lists_of_instruction_sets_are_whole() -> None:
    for path in (*source_files(), *DOCUMENTS):
        if path.parts[len(ROOT.parts)] not in ("csrc", "msp") and path.name != "cpu.md":
            continue  # others may speak of some of them
        for line in read(path).splitlines():
            words = set(re.findall(r"\w+", line))
            if len(words & set(ISAS)) > 2:
                assert words >= set(ISAS), (path, line)
