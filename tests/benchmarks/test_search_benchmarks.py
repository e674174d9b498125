"""What the benchmark and the plan of the search say: tables from rows, arithmetic from shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import bench_search
import pytest
import runner
import search_plan
import torch
from families import FAMILIES, VOCABULARY
from search_plan import SHAPES, Device, Plan
from transformers import AutoModelForCausalLM

from msp.allocators.evolution import EvolutionOptions
from msp.text.token_sets import TokenSets

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = replace(EvolutionOptions(), offspring=16, token_shares=(1 / 16, 1 / 4, 1.0), survivors=(0.3, 0.3))


def plan(index: int, **device: float) -> Plan:
    return Plan(SHAPES[index], replace(Device(), **device), OPTIONS, fitness_tokens=131_072, window=2048)


def test_the_models_have_the_weights_they_are_named_for() -> None:
    # the counts their makers publish; norms and embeddings beside what is counted here
    for shape, published in zip(SHAPES, (6_738_415_616, 70_553_706_496, 405_853_388_800), strict=True):
        norms = (2 * shape.blocks + 1) * shape.hidden
        assert shape.linears + 2 * shape.head + norms == published, shape.name


def test_a_stage_forwards_what_its_candidates_have_not_seen() -> None:
    assert plan(0).stages == [(16, 8192), (5, 24_576), (2, 98_304)]
    assert plan(0).passes[0] == (1 + 256, 8192)


def test_the_seconds_of_a_small_model_by_hand() -> None:
    measuring, racing, levels, loading = plan(0, flops=1e15, compute=0.5, hbm=1e12, memory=0.5).seconds(1)
    a_token = 2 * (6_476_005_376 + 131_072_000) + 32 * 4 * 4096 * 1024
    assert measuring == pytest.approx(257 * 8192 * a_token / 5e14)
    assert racing == pytest.approx((16 * 8192 + 5 * 24_576 + 2 * 98_304) * a_token / 5e14)
    assert levels == pytest.approx((23 + 257 / 224) * 6_476_005_376 * 5 / 5e11)
    assert loading == 0 and not plan(0).streamed


def test_a_large_model_is_streamed_once_a_pass() -> None:
    large = plan(1, pcie=1e10, link=0.5)
    assert large.streamed and large.loads == 4 * large.shape.linears * 3
    measuring, racing, levels, loading = large.seconds(1)
    assert loading == pytest.approx(large.loads / 5e9)
    assert large.generation(1) == max(measuring + racing + levels, loading)
    eight = large.seconds(8)
    assert eight[0] / measuring == pytest.approx(33 / 257)
    # two, one and one candidate in turn on the busiest of eight
    assert eight[1] / racing == pytest.approx((2 * 8192 + 24_576 + 98_304) / 450_560)


def test_the_page_has_the_table_of_the_present_constants() -> None:
    page = (ROOT / "docs" / "search-reference.md").read_text(encoding="utf-8")
    made = search_plan.table(search_plan.default_plans())
    assert f"<!-- table:plan -->\n{made}<!-- /table:plan -->" in page, "run benchmarks/search_plan.py --write"


def test_the_benchmark_measures_the_search_there_is() -> None:
    """On a tiny model: what it says is consistent, and a search that is off is refused."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval()
    windows = torch.randint(VOCABULARY, (512, 16), generator=torch.Generator().manual_seed(1))
    tokens = TokenSets(windows[:8], windows, windows[:1], 16, {})
    row = bench_search.measure_search(model, tokens, turns=1)
    assert row["error"] <= row["bound"]
    assert row["share"].keys() == {"setting levels", "engine"} and all(0 < s < 1 for s in row["share"].values())
    for name, ratio in row["ratio"].items():
        speeds = row["tokens_per_second"]
        assert speeds["ours"] / speeds[name] == pytest.approx(ratio)
    with (
        patch.object(bench_search, "masked_kl", lambda *_: 1e9),
        pytest.raises(AssertionError, match="no speed is worth reporting"),
    ):
        bench_search.measure_search(model, tokens, turns=1)


def test_rows_of_the_search_have_a_file_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"name": "test_search[some]", "median_seconds": 2.0, "error": 1e-4, "ratio": {"bare forward": 0.95}}
    row |= {"candidates_per_second": 3.25, "tokens_per_second": {"ours": 9500.0, "bare forward": 10_000.0}}
    row |= {"share": {"engine": 0.0123}}
    (tmp_path / "docs").mkdir()
    for kind, page in runner.PAGES.items():
        text = f"before\n<!-- table:{kind} -->\nold\n<!-- /table:{kind} -->\nafter\n"
        (tmp_path / "docs" / page).write_text(text)
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "search-trials.json").write_text("{}")
    where = {"processor": "Some CPU", "isa": "some", "threads": 2, "read_gb_per_second": 10.0, "commit": "abc"}
    two = {"name": "test_two", "median_seconds": 1.0, "error": 0, "ratio": {"one worker": 1.75}}
    two |= {"candidates_per_second": 4.5}
    runner.save({**where, "versions": {"torch": "9"}}, [row, two])
    (path,) = tmp_path.glob("search-some-*.json")
    assert json.loads(path.read_text())["rows"] == [row, two]
    told = (tmp_path / "docs" / "search-notebook.md").read_text()
    assert "| test_search[some] | 3.25 | 9,500 | 10,000 (**0.95x**) | 1.2% | 1.0e-04 |\n\n" in told
    assert told.startswith("before") and told.endswith("after\n") and "old" not in told
    assert "old" in (tmp_path / "docs" / "cpu.md").read_text() and not list(tmp_path.glob("cpu-*"))
    assert "| test_two | 1000.000 ms |  |  | 0.0e+00 | one worker **1.75x** |\n<!-- /table:search -->" in told
