"""What CONTRIBUTING tells newcomers to write works as printed."""

import re
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, build

import msp
from msp.data import save_tokens

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"## Add an? (\w+)\n.*?```python\n(.*?)```", TEXT, flags=re.DOTALL))


@pytest.mark.parametrize(("what", "name"), [("pruner", "activation"), ("allocator", "first-half")])
def test_the_example_can_be_used_at_once(what: str, name: str, tmp_path: Path) -> None:
    assert EXAMPLES[what].count("\n") < 60
    exec(compile(EXAMPLES[what], "CONTRIBUTING.md", "exec"), {"__name__": "example"})
    save_tokens(torch.randint(0, VOCABULARY, (512,)), tmp_path / "tokens.safetensors")
    options = {"allocator": "uniform", what: name}
    result = msp.prune(
        build("llama"), sparsity=0.75, calibration=str(tmp_path / "tokens.safetensors"), window=16,
        calibration_tokens=64, fitness_tokens=64, test_tokens=64, device="cpu", **options,
    )  # fmt: skip
    assert result.recipe[what] == name
    assert result.kept <= result.budget
    levels = {name.split(".")[2]: pattern.n for name, pattern in result.allocation.items()}
    assert (levels["0"] > levels["1"]) == (what == "allocator")
