"""The table of GPU figures says what the results say, and nothing where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu import runner, tables
from gpu.figures import FIGURES


def benchmark(rows: list[dict], outcome: str = "passed", needed: int | None = None) -> dict:
    keys = {key for one in rows for key in one["figures"]}
    return {
        "part": "bench",
        "outcome": outcome,
        "rows": rows,
        "roofs": {"copy_gbps": 4000.0, "dense_tflops": 800.0},
        "figures": {key: needed or sum(key in one["figures"] for one in rows) for key in keys},
    }


def result(benchmarks: dict[str, dict], date: str = "2030-01-02T03:04:05", **more) -> dict:
    units = [{**one, "name": op} for op, one in benchmarks.items()]
    machine = {"device": {"name": "Some GPU", "driver": "1.2"}}
    return {"date": date, "units": units, "machine": machine, "commit": "0123456789ab", "dry": False, **more}


def row(key: str, **measured) -> dict:
    return {"name": "op", "shape": "8x8", "error": 0.0, "bound": 1.0, "median_us": 1.0, "figures": [key], **measured}


@pytest.mark.parametrize(
    ("key", "rows", "told"),
    [
        ("linear-2:8", [{"ratio": {"cuBLAS": 3.0}}, {"ratio": {"cuBLAS": 2.9}}], "**2.9 x** (2 rows)"),
        ("linear-2:8", [{"ratio": {"cuBLAS": 3.0}}, {"ratio": {"cuBLAS": 2.5}}], "2.5 x (2 rows)"),
        ("spmm-cusparselt", [{"ratio": {"cuSPARSELt": 2.0}}, {"ratio": {"cuSPARSELt": 0.5}}], "1 x (2 rows)"),
        # the search for the best algorithm may have chosen worse than torch
        (
            "spmm-dense",
            [
                {"ratio": {"cuBLAS": 1.9, "cuBLASLt": 1.8, "cuBLASLt best": 1.6}},
                {"ratio": {"cuBLAS": 1.2, "cuBLASLt": 1.6, "cuBLASLt best": 1.7}},
            ],
            "**1.6 x** (2 rows)",
        ),
        (
            "spmm-dense",
            [{"missing": {"cuBLASLt best": "not loaded"}, "ratio": {"cuBLAS": 1.6, "cuBLASLt": 1.6}}],
            "not measured: cuBLASLt best: not loaded",
        ),
        ("spmm-dense-torch", [{"ratio": {"cuBLAS": 1.6, "cuBLASLt": 1.7}}], "**1.6 x** (1 row)"),
        ("linear-bandwidth", [{"gbps": 3400.0}], "**85 %** (1 row)"),
        ("fisher-diag-rate", [{"tflops": 400.0}], "50 % (1 row)"),
        ("decode-memory", [{"extra": {"memory": 0.39}}], "**0.39 x** (1 row)"),
        ("fisher-trace-memory", [{"extra": {"more_gb": 1.0}}, {"extra": {"more_gb": 2.5}}], "2.5 GB (2 rows)"),
        (
            "spmm-cusparselt",
            [{"missing": {"cuSPARSELt": "none"}, "ratio": {}}],
            "not measured: cuSPARSELt: none",
        ),
        ("obs-prune", [{"median_us": None}], "not measured: the error of 1 of 1 rows is out of bound"),
        ("obs-prune", [], "not measured"),
    ],
)
def test_a_figure_is_made_of_its_rows(key: str, rows: list[dict], told: str) -> None:
    figure = FIGURES[key]
    full = [{name: value for name, value in row(key, **one).items() if value is not None} for one in rows]
    other = row("another", ratio={"cuBLAS": 0.1}, gbps=1.0)
    assert tables.measured(key, figure, benchmark([*full, other])) == told


def test_a_figure_of_which_rows_are_missing_is_none() -> None:
    key, figure, good = "linear-2:8", FIGURES["linear-2:8"], row("linear-2:8", ratio={"cuBLAS": 3.0})
    told = tables.measured(key, figure, benchmark([good], "cut short", needed=4))
    assert told == "incomplete: 1 of 4 rows: cut short"
    failed = {"name": "op", "shape": "9x9", "failed": "RuntimeError: no", "figures": [key]}
    told = tables.measured(key, figure, benchmark([good, failed], "failed"))
    assert told == "incomplete: 1 of 2 rows: RuntimeError: no"
    # what was cut short after the figure's rows
    assert tables.measured(key, figure, benchmark([good], "cut short")) == "**3 x** (1 row)"


def test_each_benchmark_is_of_the_newest_result_that_has_it(tmp_path: Path) -> None:
    def saved(name: str, date: str, ratios: dict[str, float], **more) -> Path:
        figures = {"obs_prune": ("obs-prune", "torch loop"), "nm_linear": ("linear-2:8", "cuBLAS")}
        rows = {op: [row(figures[op][0], ratio={figures[op][1]: ratio})] for op, ratio in ratios.items()}
        path = tmp_path / name
        path.write_text(json.dumps(result({op: benchmark(found) for op, found in rows.items()}, date, **more)))
        return path

    old = saved("b.json", "2030-01-02T03:00:00", {"obs_prune": 60.0, "nm_linear": 2.0}, commit="feedbeef00")
    new = saved("a.json", "2030-01-02T04:00:00", {"nm_linear": 3.0})
    dry = saved("c.json", "2030-01-02T05:00:00", {"nm_linear": 9.0}, dry=True)
    told = tables.table(tables.newest_benchmarks([new, old, dry]))
    assert "**60 x** (1 row)" in told and "**3 x** (1 row)" in told
    assert "- `obs_prune`: Some GPU, driver 1.2, commit feedbeef0, `b.json`\n" in told
    assert "- `nm_linear`: Some GPU, driver 1.2, commit 012345678, `a.json`\n" in told
    assert "2 x (1 row)" in tables.table(tables.newest_benchmarks([old]))


def test_nothing_is_measured_without_a_result() -> None:
    lines = [line for line in tables.table({}).splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(FIGURES) and all("| not measured |" in line for line in lines)


def test_the_page_is_of_the_newest_result() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.fill(page, tables.newest_benchmarks(tables.committed())) == page, "make gpu-table"


def test_benchmarks_name_figures_that_there_are() -> None:
    for op, path in runner.registry().items():
        text = path.read_text(encoding="utf-8")
        for key, figure in FIGURES.items():
            assert f'"{key}"' not in text or figure.op == op, f"{path.name} measures {key} for bench_{figure.op}.py"
