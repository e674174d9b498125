"""The table of GPU figures says what the results say, and nothing where there are none."""

from __future__ import annotations

import pytest
from gpu import runner, tables
from gpu.figures import FIGURES


def result(op: str, rows: list[dict], outcome: str = "passed") -> dict:
    unit = {
        "part": "bench",
        "name": op,
        "outcome": outcome,
        "rows": rows,
        "roofs": {"copy_gbps": 4000.0, "dense_tflops": 800.0},
    }
    device = {"name": "Some GPU", "driver": "1.2"}
    return {"units": [unit], "machine": {"device": device}, "commit": "0123456789ab", "file": "some.json", "dry": False}


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
    assert tables.measured(key, figure, result(figure.op, [*full, other])) == told
    assert told in tables.table(result(figure.op, full))


def test_a_benchmark_that_was_cut_short_is_said_so() -> None:
    rows = [row("linear-2:8", ratio={"cuBLAS": 3.0})]
    told = tables.measured("linear-2:8", FIGURES["linear-2:8"], result("nm_linear", rows, "cut short"))
    assert told == "**3 x** (1 row, cut short)"


def test_nothing_is_measured_without_a_result() -> None:
    lines = [line for line in tables.table(None).splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(FIGURES) and all("| not measured |" in line for line in lines)


def test_the_page_is_of_the_newest_result() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.fill(page, tables.newest_result()) == page, "make gpu-table"


def test_benchmarks_name_figures_that_there_are() -> None:
    for op, path in runner.registry().items():
        text = path.read_text(encoding="utf-8")
        for key, figure in FIGURES.items():
            assert f'"{key}"' not in text or figure.op == op, f"{path.name} measures {key} for bench_{figure.op}.py"
