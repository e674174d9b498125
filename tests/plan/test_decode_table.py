"""Budgets in decode time: the table, what levels cost by it, and that it is met."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SMALL, build
from torch import nn

import msp
from msp.engine.operators import swap
from msp.errors import MspError, UsageError
from msp.evidence import decode_times
from msp.formats.patterns import NMPattern
from msp.formats.storage import DENSE, Storage
from msp.models.structure import find_structure
from msp.packed.sparse_linear import SparseLinear
from msp.plan.decode_table import DecodeTable
from msp.plan.levels import cost, levels_from_densities, repair
from msp.plan.plans import Goal, PatternRules, make_plan, parse_time, patterns_of
from msp.session import opened

STRUCTURE = find_structure(build("llama"))
SHAPES = [linear.shape for linear in STRUCTURE.linears]


def made_up(seed: int, dtype: str = "float32") -> DecodeTable:
    """Times that grow with what is kept, as measured ones do: roughly, and each shape its own way."""
    rng = np.random.default_rng(seed)
    times = {}
    for rows, columns in dict.fromkeys(SHAPES):
        size = rows * columns / 1000
        of = {f"{n}:8": size * (0.1 + n / 6) * rng.uniform(0.97, 1.03) for n in range(8)}
        times[rows, columns] = {"dense": size * rng.uniform(0.97, 1.03), **of}
    return DecodeTable(dtype, {"device": "made up", "threads": 1}, times)


def dense_time(table: DecodeTable) -> int:
    return sum(table.nanoseconds(shape, DENSE) for shape in SHAPES)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = made_up(0)
    table.save(tmp_path / "new" / "table.json")
    assert DecodeTable.load(tmp_path / "new" / "table.json") == table
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"linears": []}', '{"dtype": "x", "machine": {}, "linears": [{"shape": [1]}]}']
)
def test_what_is_no_table_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(MspError, match=r"t\.json is not a decode table"):
        DecodeTable.load(tmp_path / "t.json")


@pytest.mark.parametrize("time", [0, -1.0, math.inf, math.nan])
def test_impossible_times_are_refused(time: float, tmp_path: Path) -> None:
    content = made_up(0).to_json()
    content["linears"][0]["microseconds"]["2:8"] = time
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(MspError, match=r"positive|NaN|Infinity"):
        DecodeTable.load(tmp_path / "t.json")


def test_rounding_is_far_below_the_noise_of_measuring() -> None:
    table = made_up(1)
    slow = {shape: {name: 1e6 * time for name, time in times.items()} for shape, times in table.times.items()}
    rounded = DecodeTable("float32", {}, slow).rounded(SHAPES)
    grid = math.gcd(*(rounded.nanoseconds(shape, Storage(NMPattern(n, 8))) for shape in SHAPES for n in range(9)))
    assert grid > 1000
    for shape, times in slow.items():
        for name, time in times.items():
            assert rounded.times[shape][name] == pytest.approx(time, abs=grid / 1000, rel=0)
            assert abs(rounded.times[shape][name] - time) < 1e-3 * time


@pytest.mark.parametrize("unit", ["linear", "block"])
@pytest.mark.parametrize("seed", range(3))
def test_levels_rise_in_time_and_meet_the_budget(unit: str, seed: int) -> None:
    table = made_up(seed).rounded(SHAPES)
    limit = dense_time(table) // 2
    plan = make_plan(STRUCTURE, Goal(None, nanoseconds=limit, table=table), PatternRules.parse(8), unit=unit)
    assert plan.objective == "nanoseconds" and plan.limit == limit and plan.dense_cost == dense_time(table)
    names = {linear.name: linear.shape for linear in STRUCTURE.linears}
    for entry in plan.units:
        for level, pattern in enumerate(patterns_of(entry)):
            assert entry.costs[level] == sum(table.nanoseconds(names[name], Storage(pattern)) for name in entry.linears)
        dense = sum(table.nanoseconds(names[name], DENSE) for name in entry.linears)
        assert all(low + dense // 100 <= high for low, high in pairwise(entry.costs))
        # 6:8 and 7:8 take longer than dense here, so nothing is gained by them.
        assert [level.label for level in entry.levels] == ["0:8", "1:8", "2:8", "3:8", "4:8", "5:8", "8:8"]
    rng = np.random.default_rng(seed)
    levels = levels_from_densities(rng.uniform(0, 1, len(plan.units)).tolist(), plan.units, plan.budget)
    for _ in range(40):
        levels = repair(swap(levels, plan.units, 1, rng), plan.units, plan.budget, rng=rng)
        assert plan.budget.is_met(cost(levels, plan.units))


def test_linears_left_dense_take_their_time() -> None:
    table = made_up(2)
    rules = PatternRules.parse(8, keep=".*down_proj=dense")
    plan = make_plan(STRUCTURE, Goal(None, nanoseconds=dense_time(table) * 3 // 5, table=table), rules)
    pinned = [linear for linear in STRUCTURE.linears if linear.kind.endswith("down_proj")]
    assert plan.fixed_cost == sum(table.nanoseconds(linear.shape, DENSE) for linear in pinned) > 0


@pytest.mark.parametrize(
    ("text", "nanoseconds"), [("12ms", 12_000_000), ("800 us", 800_000), ("1.5s", 1_500_000_000), ("0.0125us", 12)]
)
def test_times_are_read_with_their_unit(text: str, nanoseconds: int) -> None:
    assert parse_time(text) == nanoseconds


@pytest.mark.parametrize("text", ["12", "ms", "-1ms", "1 min", "", "9" * 5000 + "ms", "１ms"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="12ms or 800us"):
        parse_time(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shape_is_measured_with_what_fits_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the layers that a packed model would call, each with a weight of its own, and as many as the model has."""
    seen = []

    def timed(linears, columns: int) -> float:
        assert len(
            {
                linear.state_dict()["values" if isinstance(linear, SparseLinear) else "weight"].data_ptr()
                for linear in linears
                if not isinstance(linear, SparseLinear) or linear.pattern.n
            }
        ) in (0, len(linears))
        seen.append((linears[0], columns, len(linears)))
        return 1e-6 * (1 + len(seen) % 3)

    monkeypatch.setattr(decode_times, "_seconds", timed)
    patterns = [NMPattern.parse(text) for text in ("0:8", "2:8", "8:8", "3:16")]
    shapes = [(16, 32), (16, 32), (8, 40)]
    table = decode_times.measure_decode(shapes, patterns, dtype=dtype, device=torch.device("cpu"))
    assert {shape: list(times) for shape, times in table.times.items()} == {
        (16, 32): ["dense", "0:8", "2:8", "3:16"],
        (8, 40): ["dense", "0:8", "2:8"],
    }
    assert table.dtype == str(dtype).removeprefix("torch.")
    assert len(seen) == 3 * 7
    for linear, columns, count in seen:
        assert count == (math.ceil(1344 / 512) if columns == 32 else math.ceil(1344 / 320))
        assert isinstance(linear, (SparseLinear, nn.Linear)) and linear.in_features == columns
        assert next(linear.parameters()).dtype == dtype
    # The median of the three rounds of every case, whose times differ.
    assert all(time == pytest.approx(2.0) for times in table.times.values() for time in times.values())


def test_copies_take_no_more_than_overflows_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    monkeypatch.setattr(decode_times, "ROTATED_BYTES", 10_000)
    monkeypatch.setattr(decode_times, "_seconds", lambda linears, _: float(counts.append(len(linears)) or 1))
    decode_times.measure_decode([(16, 32)] * 50, [], dtype=torch.float32, device=torch.device("cpu"))
    assert counts == [math.ceil(10_000 / (16 * 32 * 4))] * decode_times.ROUNDS


@pytest.mark.parametrize("allocator", ["uniform", "msp"])
def test_a_model_is_pruned_to_a_decode_time(allocator: str, llama: Path, text: str, tmp_path: Path) -> None:
    table = made_up(3)
    table.save(tmp_path / "t.json")
    limit = dense_time(table) // 2
    asked = {"budget_decode": f"{limit / 1000}us", "decode_table": tmp_path / "t.json", "evaluations": 16}
    result = msp.prune(llama, allocator=allocator, calibration=text, **asked, **SMALL)
    shapes = {linear.name: linear.shape for linear in STRUCTURE.linears}
    # The prediction, from the table and the packed modules.
    predicted = 0.0
    for name, shape in shapes.items():
        module = result.model.get_submodule(name)
        predicted += table.times[shape][str(module.pattern) if isinstance(module, SparseLinear) else "dense"] * 1000
    assert result.spent == pytest.approx(predicted, abs=len(shapes))
    assert result.objective == "nanoseconds" and result.spent <= result.budget == limit
    assert limit - result.spent < max(dense_time(table) // 100, 100)
    assert result.dense_cost == pytest.approx(dense_time(table), abs=len(shapes))
    assert result.recipe["budget_decode"] and "sparsity" not in result.recipe


def test_a_resumed_search_keeps_the_times_it_began_with(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = iter([made_up(4), made_up(5), made_up(6)])
    monkeypatch.setattr(opened, "measure_decode", lambda *_, **__: next(tables))
    monkeypatch.setattr(opened, "machine", lambda _: made_up(4).machine)
    asked = {"budget_decode": f"{dense_time(made_up(4)) / 2000}us", "calibration": text, **SMALL}
    whole = msp.search(llama, evaluations=48, **asked)
    tables = iter([made_up(4), made_up(5)])
    msp.search(llama, evaluations=16, work_dir=tmp_path, **asked)
    resumed = msp.search(llama, evaluations=48, work_dir=tmp_path, resume=True, **asked)
    assert resumed.allocation == whole.allocation and len(resumed.history) == 4
    monkeypatch.setattr(opened, "machine", lambda _: {**made_up(4).machine, "threads": 2})
    with pytest.raises(MspError, match=r"decode-table\.json was not measured here: threads 2, was 1; .* decode_table"):
        msp.search(llama, evaluations=48, work_dir=tmp_path, resume=True, **asked)
    given = {**asked, "decode_table": tmp_path / "decode-table.json"}
    moved = msp.search(llama, evaluations=48, work_dir=tmp_path, resume=True, **given)
    assert moved.allocation == whole.allocation
    made_up(7).save(tmp_path / "other.json")
    with pytest.raises(MspError, match=r"another search: the costs of the patterns differ;"):
        msp.search(
            llama,
            evaluations=48,
            work_dir=tmp_path,
            resume=True,
            **{**asked, "decode_table": tmp_path / "other.json"},
        )


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (made_up(0, "bfloat16"), {}, "table is of bfloat16, but the model is stored in torch.float32"),
        (made_up(0), {"patterns": "1:4,2:4"}, "no time for 2:4 at"),
        (made_up(0), {"budget_decode": "1us"}, "out of reach"),
        (made_up(0), {"budget_decode": "1s"}, "more than the patterns keep"),
        (made_up(0), {"budget_decode": "fast"}, "12ms or 800us"),
        (made_up(0), {"budget_decode": None, "sparsity": 0.5}, "goes with budget_decode"),
        (made_up(0), {"sparsity": 0.5}, "one of them"),
    ],
)
def test_what_does_not_fit_is_refused(table, options, message, llama: Path, text: str, tmp_path: Path) -> None:
    table.save(tmp_path / "t.json")
    asked = {"budget_decode": "10us", "decode_table": tmp_path / "t.json", "calibration": text, **SMALL, **options}
    with pytest.raises(UsageError, match=message):
        msp.prune(llama, **asked)
