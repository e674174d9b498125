"""The citation file and the issue forms are what the programs that read them take."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import msp

ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version_and_licence() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what CFF 1.2 requires
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == msp.__version__
    assert f'license = "{cited["license"]}"' in PROJECT
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert f'Paper = "{paper["url"]}"' in PROJECT


@pytest.mark.parametrize("form", [form for form in FORMS if form.name != "config.yml"], ids=lambda form: form.stem)
def test_an_issue_form_is_complete(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert content["name"] and content["description"]
    ids = [element["id"] for element in content["body"]]
    assert len(set(ids)) == len(ids)
    for element in content["body"]:
        assert element["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert element["attributes"]["label"]
        # YAML reads a bare yes as a truth value, which the host refuses
        assert all(isinstance(option, str) for option in element["attributes"].get("options", []))


def test_there_is_a_form_for_each_kind_of_issue() -> None:
    assert {form.stem for form in FORMS} >= {"bug", "feature", "wrong_result"}
