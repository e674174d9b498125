"""Packed models are written today as they were: manifest, and by its hashes every byte of every tensor.

``python tests/formats/test_golden_manifests.py`` writes the golden manifests anew, which only a new format may ask for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import build, pack

from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.info import validate_packed

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama-tied", "gpt2")


def write(family: str, folder: Path) -> dict[str, Any]:
    """Pack a model of ``family`` whose weights are made of integers, so the same with every version of torch."""
    model = build(family)
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            numbers = torch.arange(tensor.numel()).view(tensor.shape)
            tensor.copy_(((numbers * 7919 + 104_729 * index) % 2003 - 1001) / 1024)
    replace_linears(model, pack(model))
    save_packed(model, None, folder, recipe={"sparsity": 0.5, "seed": 3})
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    del config["versions"]
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_manifest_and_tensors_are_as_they_were(family: str, tmp_path: Path) -> None:
    found = write(family, tmp_path / "out")
    assert found == json.loads((GOLDEN / f"{family}.json").read_text())
    validate_packed(tmp_path / "out")


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            golden = json.dumps(write(name, Path(place) / "out"), indent=1) + "\n"
        (GOLDEN / f"{name}.json").write_text(golden)
