"""Tables, progress and pictures."""

from __future__ import annotations

import io
import json
import math
import random
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from msp.base.progress import NoProgress
from msp.formats.patterns import Allocation, NMPattern
from msp.session.results import CompareResult, CompareRow, PruneResult, SensitivityResult
from msp.show import pictures
from msp.show.report import (
    RichProgress,
    compare_report,
    duration,
    figures_report,
    merge_experts,
    number,
    prune_report,
    sensitivity_report,
    size,
    split_name,
    to_json,
)

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def rendered(report, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report)
    return console.file.getvalue()


def an_allocation(blocks: int, group: int = 8, seed: int = 0) -> Allocation:
    rng = random.Random(seed)
    names = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    return Allocation({name: NMPattern(rng.randint(0, group // 2), group) for name in names})


def a_result(**changes) -> PruneResult:
    allocation = an_allocation(3)
    given = {
        "density": 0.25,
        "kept": 123_456,
        "budget": 123_457,
        "objective": "weights",
        "spent": 123_456,
        "dense_cost": 493_824,
        "allocation": allocation,
        "skipped": {
            f"model.layers.{i}.mlp.gate_proj": "172 input features [odd] are no multiple of 8" for i in range(5)
        },
        "perplexity": {"dense": 5.5, "pruned": 77.25},
        "kl": 1.234,
        "bytes": {"dense": 3_200_000, "packed": 1_000_000},
        "seconds": {"load": 1.5, "allocate": 200.0},
        "peak_memory": 2_000_000_000,
        "history": [{"evaluations": 8 * i, "tokens": 1, "best": 2 - i / 9, "mean": 3 - i / 9} for i in range(1, 9)],
        "sensitivities": {name: 0.5 + index for index, name in enumerate(allocation)},
        "recipe": {"fitness": "kl"},
        "model": None,
        "tokenizer": None,
    }
    return PruneResult(**given | changes)


def a_comparison(seeds: int = 2) -> CompareResult:
    rows = []
    for pruner, factor in (("wanda", 1.0), ("magnitude", 3.0)):
        for allocator, kl in (("uniform", 0.9), ("msp", 0.4)):
            rows += [
                CompareRow(allocator, pruner, s, 0.25, kl * factor + s / 100, 90 * factor, 7, 2.0) for s in range(seeds)
            ]
            spread = {"kl": 0.01, "perplexity": 0.0}
            rows.append(CompareRow(allocator, pruner, "mean", 0.25, kl * factor, 90 * factor, 7, 2.0, spread))
    return CompareResult(rows, 4.5, {"evaluate": "test.txt", "window": 256})


def test_the_prune_table_holds_every_figure():
    shown = rendered(prune_report(a_result(), Path("out [final]")))
    for text in ("25.00%", "77.25", "5.5", "1.234", "3.20 MB", "1.00 MB", "3.20x", "123,456", "123,457", "0:8", "4:8"):
        assert text in shown
    assert "model.layers.2.mlp.gate_proj and 2 more" in shown
    assert "172 input features [odd] are no multiple of 8" in shown, "brackets are text, not markup"
    assert "out [final]" in shown
    assert "allocate 3 min 20 s" in shown and "peak memory 2.00 GB" in shown


def test_patterns_are_counted():
    allocation = Allocation.from_strings({f"m.{i}.a": "2:8" if i < 7 else "10:16" for i in range(10)})
    lines = rendered(prune_report(a_result(allocation=allocation, skipped={}))).splitlines()
    assert any(line.split()[:2] == ["2:8", "7"] for line in lines)
    assert any(line.split()[:2] == ["10:16", "3"] for line in lines)


def test_the_compare_table_shows_means_and_marks_the_best():
    shown = rendered(compare_report(a_comparison()))
    assert shown.count("uniform") == shown.count("msp") == 2
    assert "0.4 ± 0.01" in shown and "2.7 ± 0.01" in shown
    assert "Dense perplexity 4.5" in shown and "evaluate test.txt" in shown and "window 256" in shown
    assert "Mean over 2 seeds" in shown
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard", no_color=False)
    console.print(compare_report(a_comparison()))
    bold = [line for line in console.file.getvalue().splitlines() if "\x1b[1m" in line and "wanda" in line]
    assert len(bold) == 1 and "msp" in bold[0]


def test_the_compare_table_can_show_every_seed():
    shown = rendered(compare_report(a_comparison(seeds=3), every_seed=True))
    assert shown.count("uniform") == 2 * 4 and "mean" in shown


def test_the_sensitivity_table_adds_up():
    traces = {f"model.layers.{b}.{kind}": (b + 1) * (k + 1) for b in range(2) for k, kind in enumerate(KINDS)}
    shown = rendered(sensitivity_report(SensitivityResult(traces, [21, 42], {}, {})))
    assert "33.3%" in shown and "66.7%" in shown
    assert shown.index("mlp.down_proj") < shown.index("Sensitivity by kind")
    kinds = shown[shown.index("Sensitivity by kind") :]
    assert kinds.index("mlp.down_proj") < kinds.index("self_attn.q_proj"), "the most sensitive kind comes first"


def test_a_model_without_gradients_has_a_table_too():
    assert "0.0%" in rendered(sensitivity_report(SensitivityResult({"m.0.a": 0.0, "m.1.a": 0.0}, [0, 0], {}, {})))


def test_figures_are_flattened_and_missing_ones_left_out():
    shown = rendered(figures_report({"perplexity": 1234.5, "kl": None, "bytes": {"dense": 7}, "dtype": "[bf16]"}))
    assert "1,234" in shown and "Bytes: dense" in shown and "[bf16]" in shown and "kl" not in shown.lower()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (12.3456, "12.35"),
        (99999, "99,999"),
        (1.5e8, "1.50e+08"),
        (2e-5, "2.00e-05"),
        (math.inf, "∞"),
    ],
)
def test_numbers(value: float, text: str):
    assert number(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_560_000_000, "2.56 GB")])
def test_sizes(count: int, text: str):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.11.self_attn.q_proj", 11, "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", 0, "attn.c_attn"),
        ("model.layers.3.mlp.experts.5.w1", 3, "mlp.experts.5.w1"),
        ("gpt_neox.layers.7.attention.dense", 7, "attention.dense"),
        ("3.fc1", 3, "fc1"),
        ("head", 0, "head"),
    ],
)
def test_names_split_into_block_and_kind(name: str, block: int, kind: str):
    assert split_name(name) == (block, kind)


def test_experts_share_a_name():
    assert merge_experts("mlp.experts.15.w1") == "mlp.experts.*.w1"
    assert merge_experts("experts.0") == "experts.*"
    assert merge_experts("mlp.fc1") == "mlp.fc1"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50, deadline=None)
@given(json_values)
def test_json_is_strict_and_one_line(value):
    text = to_json(value)
    assert "\n" not in text
    json.loads(text, parse_constant=pytest.fail)


def test_json_spells_what_it_cannot_say_as_null():
    assert json.loads(to_json({"a": [math.inf, 1.5, (math.nan,)], 3: "x"})) == {"a": [None, 1.5, [None]], "3": "x"}


def log_of(terminal: bool, run) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with RichProgress(console) as progress:
        run(progress)
    return console.file.getvalue()


def two_stages(progress):
    with progress.stage("Outer [a]", 4) as advance:
        for step in range(4):
            with progress.stage("Inner", None) as inner:
                inner(1, 3)
            advance(step + 1, best_loss=0.125 * step)
    with progress.stage("Second"):
        pass


def test_progress_in_a_log_is_one_line_per_stage():
    lines = log_of(False, two_stages).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Outer [a]: ") and lines[0].endswith("best loss 0.375")
    assert lines[1].startswith("Second: ")


def test_progress_on_a_terminal_ends_full_and_without_inner_bars():
    last = log_of(True, two_stages).replace("\x1b[2K", "\n").splitlines()
    final = "\n".join(last[-3:])
    assert "Outer [a]" in final and "4/4" in final and "Second" in final and "Inner" not in final


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_survives_an_error(terminal: bool):
    def failing(progress):
        with pytest.raises(ValueError, match="stop"), progress.stage("Broken", 3) as advance:
            advance(1)
            with progress.stage("Deeper"):
                raise ValueError("stop")
        with progress.stage("After"):
            pass

    assert "After" in log_of(terminal, failing)


def test_no_progress_listens_to_anything():
    with NoProgress().stage("x", 3) as advance:
        assert advance(1, 5, best=2) is None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the files, to look inside; every warning of matplotlib is an error."""
    figures: list[Figure] = []
    save = pictures._save

    def keep(figure: Figure, path):
        figures.append(figure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return save(figure, path)

    monkeypatch.setattr(pictures, "_save", keep)
    return figures


def assert_png(path: Path, least_width: int = 400) -> None:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert least_width <= int.from_bytes(data[16:20], "big") <= 4000


@pytest.mark.parametrize(("blocks", "group"), [(1, 4), (12, 8), (40, 16), (80, 32)])
def test_the_allocation_picture_shows_every_level(blocks: int, group: int, tmp_path: Path, drawn):
    allocation = an_allocation(blocks, group, seed=blocks)
    skipped = [f"model.layers.{block}.mlp.gate_proj" for block in range(blocks)]
    assert_png(pictures.allocation_picture(allocation, tmp_path / "a.png", skipped=skipped))
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*KINDS, "mlp.gate_proj"]
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): int(t.get_text()) for t in axes.texts}
    if blocks <= 40:
        assert written == {
            (KINDS.index(kind), block): allocation[f"model.layers.{block}.{kind}"].n
            for block in range(blocks)
            for kind in KINDS
        }
    else:
        assert not written
    assert "grey: left dense" in axes.get_xlabel()


def test_the_allocation_picture_averages_many_experts(tmp_path: Path, drawn):
    names = [f"model.layers.{b}.mlp.experts.{e}.{w}" for b in range(3) for e in range(16) for w in ("w1", "w2")]
    allocation = Allocation({name: NMPattern(1 + index % 4, 8) for index, name in enumerate(names)})
    assert_png(pictures.allocation_picture(allocation, tmp_path / "a.png"))
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mlp.experts.*.w1", "mlp.experts.*.w2"]
    assert {text.get_text() for text in axes.texts} == {"2", "3"}


def test_an_empty_allocation_has_no_picture(tmp_path: Path):
    with pytest.raises(ValueError, match="empty allocation"):
        pictures.allocation_picture(Allocation({}), tmp_path / "a.png")


def test_the_sensitivity_picture_has_a_line_per_kind(tmp_path: Path, drawn):
    traces = {f"h.{block}.{kind}": 0.1 + block for block in range(5) for kind in KINDS}
    traces["h.2.mlp.up_proj"] = 0.0
    traces |= {f"h.{block}.experts.{e}": 2.0 + e for block in range(5) for e in range(4)}
    assert_png(pictures.sensitivity_picture(traces, tmp_path / "s.png"))
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    assert set(lines) == {*KINDS, "experts.*"}
    assert list(lines["experts.*"].get_ydata()) == [3.5] * 5
    assert math.isnan(lines["mlp.up_proj"].get_ydata()[2])
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()}
    assert len(styles) == len(lines), "told apart by more than colour"


@pytest.mark.parametrize("start", [2.0, 1e6, math.inf])
def test_the_search_picture(start: float, tmp_path: Path, drawn):
    history = [{"evaluations": 8 * i, "tokens": 1, "best": 2 - i / 9, "mean": start if i < 3 else 2} for i in range(9)]
    assert_png(pictures.search_picture(history, tmp_path / "s.png", fitness="perplexity"))
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "logarithm of the perplexity"
    assert list(axes.get_lines()[0].get_ydata()) == [step["best"] for step in history]
    assert axes.get_yscale() == ("log" if start == 1e6 else "linear")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_comparison_picture(seeds: int, tmp_path: Path, drawn):
    result = a_comparison(seeds)
    result.rows[0].perplexity = math.inf
    assert_png(pictures.compare_picture(result, tmp_path / "c.png"))
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["uniform", "msp"]
    assert "nats" in left.get_xlabel() and "lower is better" in right.get_xlabel()
    assert {text.get_text() for text in right.get_legend().get_texts()} == {"dense", "wanda", "magnitude"}


def test_a_run_draws_what_it_has_figures_for(tmp_path: Path):
    made = pictures.prune_pictures(a_result(), tmp_path / "new" / "folder")
    assert [path.name for path in made] == ["allocation.png", "sensitivity.png", "search.png"]
    for path in made:
        assert_png(path)
    made = pictures.prune_pictures(a_result(history=[], sensitivities=None), tmp_path / "other")
    assert [path.name for path in made] == ["allocation.png"]
