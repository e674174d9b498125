"""This environment gives the golden results, and decodes with a model that another one packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import golden_results
import pytest

from msp.packed.info import validate_packed

GOLDEN: dict[str, Any] = json.loads(golden_results.FILE.read_text(encoding="utf-8"))


def test_all_results(tmp_path: Path) -> None:
    assert golden_results.compare(golden_results.results(tmp_path), GOLDEN) == []


def test_masks_ranks_and_hashes_are_the_same_on_every_instruction_set(isa: str) -> None:
    exact, close = golden_results.of_tensors()
    found = json.loads(json.dumps({"exact": {**GOLDEN["exact"], **exact}, "close": {**GOLDEN["close"], **close}}))
    assert golden_results.compare(found, GOLDEN) == []


def test_a_model_packed_elsewhere_decodes_the_same_tokens() -> None:
    info = validate_packed(golden_results.PACKED)
    assert dict(info.manifest.hashes) == GOLDEN["exact"]["packed by wanda"]["hashes"]
    assert golden_results.generated(golden_results.PACKED) == GOLDEN["exact"]["tokens"]


@pytest.mark.parametrize(
    ("path", "factor", "told"),
    [
        (("exact", "packed by wanda", "bytes", "packed"), 2, 1),
        (("exact", "tokens", 3), 2, 1),
        (("close", "wanda", "kl"), 1 + 3e-5, 1),
        (("close", "wanda", "kl"), 1 + 3e-6, 0),
    ],
)
def test_a_change_is_told(path: tuple[Any, ...], factor: float, told: int) -> None:
    """Figures may differ by the tolerance, and nothing else at all."""
    found = copy.deepcopy(GOLDEN)
    place = found
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] *= factor
    differences = golden_results.compare(found, GOLDEN)
    assert len(differences) == told
    assert all(difference.startswith("/".join(map(str, path[:2]))) for difference in differences)


def test_what_is_missing_is_told() -> None:
    found = copy.deepcopy(GOLDEN)
    del found["exact"]["allocations"]["msp"]
    assert golden_results.compare(found, GOLDEN)[0].startswith("exact/allocations/msp: None")
