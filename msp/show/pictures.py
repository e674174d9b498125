"""Pictures of a run as PNG files: sensitivity, allocation, search progress, comparison."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from msp.base.files import replacing
from msp.base.outputs import check_file
from msp.errors import MspError
from msp.formats.patterns import NMPattern
from msp.models.structure import merge_experts
from msp.show.report import split_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from msp.session.results import CompareResult, CompareRow, ParetoResult, PruneResult

# Okabe and Ito's colours, which readers with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LEFT_DENSE = "#DDDDDD"
DPI = 150
# Written into every PNG: only one that has it is replaced.
DRAWN_BY = "msp (Mixed Sparsity Pruning)"
FITNESS_LABELS = {"kl": "KL to dense, nats a token", "perplexity": "logarithm of the perplexity"}
# Beyond these a heat map's cells are too small to write in.
MOST_ANNOTATED_BLOCKS = 40
MOST_KINDS = 24


def prune_pictures(result: PruneResult, folder: str | Path) -> list[Path]:
    """Every picture that ``result`` has figures for, written to ``folder``; returns their paths."""
    folder = Path(folder)
    made = [allocation_picture(result.allocation, folder / "allocation.png", skipped=tuple(result.skipped))]
    if result.sensitivities:
        made.append(sensitivity_picture(result.sensitivities, folder / "sensitivity.png"))
    if len(result.history) > 1:
        fitness = str(result.recipe.get("fitness", "kl"))
        made.append(search_picture(result.history, folder / "search.png", fitness=fitness))
    return made


def sensitivity_picture(traces: Mapping[str, float], path: str | Path) -> Path:
    """Fisher trace against depth, one line per kind of linear (experts averaged), on a log scale."""
    by_kind: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    places = split_names(traces)
    for name, trace in traces.items():
        block, kind = places[name]
        by_kind[merge_experts(kind)][block].append(trace)
    figure, axes = _figure(8, 4.5)
    for index, (kind, blocks) in enumerate(by_kind.items()):
        depths = sorted(blocks)
        # A linear that no token reached has trace 0, which a log scale cannot show.
        means = [float(np.mean(blocks[depth])) or math.nan for depth in depths]
        axes.plot(depths, means, label=kind, linewidth=1.5, markersize=5, **_style(index))
    axes.set_yscale("log")
    axes.set_xlabel("block (0 is nearest the input)")
    axes.set_ylabel("Fisher trace of the linear")
    axes.set_title("Sensitivity by depth and kind of linear", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, path)


def allocation_picture(allocation: Mapping[str, NMPattern], path: str | Path, *, skipped: Sequence[str] = ()) -> Path:
    """Weights kept per group: a heat map of kind of linear against block, N written into each cell.

    Linears in ``skipped`` that are in the same lists of blocks are grey. Many experts share a row, which then shows
    their mean.
    """
    if not allocation:
        raise ValueError("an empty allocation has no picture")
    group = max(pattern.m for pattern in allocation.values())
    lists = {re.split(r"\d+\.", name, maxsplit=1)[0] for name in allocation}
    grey = [name for name in skipped if re.split(r"\d+\.", name, maxsplit=1)[0] in lists]
    places = split_names([*allocation, *grey])
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    merge = len(kinds) > MOST_KINDS
    if merge:
        kinds = list(dict.fromkeys(map(merge_experts, kinds)))
    blocks = max(block for block, _ in places.values()) + 1
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for name, pattern in allocation.items():
        block, kind = places[name]
        cells[kinds.index(merge_experts(kind) if merge else kind), block].append(float(pattern.density) * group)
    kept = np.full((len(kinds), blocks), np.nan)
    for cell, values in cells.items():
        kept[cell] = np.mean(values)

    top = max(1, min(group, math.ceil(float(np.nanmax(kept)))))
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.08, 1.0, top + 1))).with_extremes(bad=LEFT_DENSE)
    figure, axes = _figure(max(5.0, min(20.0, 2.8 + 0.36 * blocks)), max(2.2, 1.5 + 0.34 * len(kinds)))
    image = axes.imshow(
        np.ma.masked_invalid(kept),
        cmap=colours,
        norm=BoundaryNorm(np.arange(-0.5, top + 1.5), top + 1),
        aspect="auto",
        interpolation="nearest",
    )
    if blocks <= MOST_ANNOTATED_BLOCKS:
        for (row, column), value in np.ndenumerate(kept):
            if not math.isnan(value):
                text = f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"
                dark = value / top < 0.55
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(blocks, 20)))
    axes.set_xlabel("block (0 is nearest the input)" + ("; grey: left dense" if np.isnan(kept).any() else ""))
    axes.set_title(f"Weights kept of every {group}", loc="left")
    axes.set_xticks(np.arange(-0.5, blocks), minor=True)
    axes.set_yticks(np.arange(-0.5, len(kinds)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, ticks=range(top + 1), pad=0.02)
    bar.set_ticklabels([f"{n}:{group}" for n in range(top + 1)])
    bar.outline.set_visible(False)
    return _save(figure, path)


def search_picture(history: Sequence[Mapping[str, Any]], path: str | Path, *, fitness: str = "kl") -> Path:
    """Best and mean fitness of the population against evaluations spent."""
    spent = [step["evaluations"] for step in history]
    figure, axes = _figure(7, 4)
    shown: list[float] = []
    for colour, (key, label) in zip(
        COLOURS, (("best", "best so far"), ("mean", "mean of the population")), strict=False
    ):
        values = [float(step[key]) for step in history]
        shown += filter(math.isfinite, values)
        axes.plot(spent, values, label=label, color=colour)
    if shown and max(shown) > 20 * min(shown) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("evaluations (candidates measured)")
    axes.set_ylabel(FITNESS_LABELS.get(fitness, fitness))
    axes.set_title("Search on the fitness tokens (lower is better)", loc="left")
    axes.legend(frameon=False)
    return _save(figure, path)


def pareto_picture(result: ParetoResult) -> bytes:
    """Fitness against density, a point for every budget, with its name, as PNG."""
    points = [point for point in result.to_json()["points"] if math.isfinite(point["loss"])]
    figure, axes = _figure(7, 4)
    axes.plot([100 * point["density"] for point in points], [point["loss"] for point in points], **_style(0))
    for point in points:
        place = (100 * point["density"], point["loss"])
        axes.annotate(point["name"], place, textcoords="offset points", xytext=(6, 6), fontsize=9)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_xlabel("density of the linears, %")
    axes.set_ylabel(FITNESS_LABELS.get(result.fitness, result.fitness))
    axes.set_title("What a budget costs, on the fitness tokens (lower is better)", loc="left")
    return _drawn(figure, "png")


def compare_picture(result: CompareResult, path: str | Path) -> Path:
    """KL and perplexity of every allocator, a colour and marker per pruner, the spread over seeds as bars."""
    rows = [row for row in result.rows if row.seed == "mean"] or list(result.rows)
    allocators = list(dict.fromkeys(row.allocator for row in rows))
    pruners = list(dict.fromkeys(row.pruner for row in rows))
    figure, panels = _figures(10, max(2.6, 1.6 + 0.4 * len(allocators)), 2)
    for axes, measure, label in zip(
        panels, ("kl", "perplexity"), ("KL to dense, nats a token", "perplexity"), strict=True
    ):
        for index, pruner in enumerate(pruners):
            mine = [row for row in rows if row.pruner == pruner]
            offset = 0.14 * (index - (len(pruners) - 1) / 2)
            axes.errorbar(
                [getattr(row, measure) for row in mine],
                [allocators.index(row.allocator) + offset for row in mine],
                xerr=_deviations(mine, measure),
                label=pruner,
                linestyle="none",
                capsize=3,
                markersize=6,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
            )
        values = [v for row in rows if math.isfinite(v := getattr(row, measure)) and v > 0]
        if values and max(values) > 4 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{label} (lower is better)")
        axes.grid(axis="x", which="both", color="#E5E5E5", linewidth=0.8)
    panels[1].axvline(result.dense_perplexity, color="#777777", linestyle="--", linewidth=1, label="dense")
    panels[0].set_yticks(range(len(allocators)), allocators)
    panels[0].invert_yaxis()
    panels[1].sharey(panels[0])
    panels[1].tick_params(labelleft=False)
    panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    density = {round(row.density, 4) for row in rows}
    at = f" at density {density.pop():.2%}" if len(density) == 1 else ""
    panels[0].set_title(f"Allocators compared{at}", loc="left")
    return _save(figure, path)


def _deviations(rows: Sequence[CompareRow], measure: str) -> list[float] | None:
    spreads = [(row.spread or {}).get(measure) or 0.0 for row in rows]
    return spreads if any(spreads) else None


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, panels = _figures(width, height, 1)
    return figure, panels[0]


def _figures(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    # No pyplot: a library that draws leaves the user's own figures and backend alone.
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, panels


def _style(index: int) -> dict[str, Any]:
    lines = ("-", "--", ":")
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": lines[index // len(COLOURS) % len(lines)],
    }


def _save(figure: Figure, path: str | Path) -> Path:
    """Write a picture in one step; ``MspError`` where it cannot be written."""
    drawn = _drawn(figure, Path(path).suffix.removeprefix(".").lower() or "png")
    with replacing(path) as new:
        new.write_bytes(drawn)
    return Path(path)


def _drawn(figure: Figure, kind: str) -> bytes:
    """A picture in memory: no temporary file of it is left by a kill."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DPI, format=kind, metadata={"Software": DRAWN_BY} if kind == "png" else None)
    return stream.getvalue()


def check_picture(path: str | Path) -> None:
    """See that a picture can be written to ``path``; to be asked before any long work.

    Raises:
        MspError: nothing can be created there, or a file is there that is not a picture of msp.
    """
    check_file(path)
    if not Path(path).is_file():
        return
    try:
        with Image.open(path) as image:
            drawn_by = image.info.get("Software")
    except (OSError, ValueError):
        drawn_by = None
    if drawn_by != DRAWN_BY:
        raise MspError(
            f"{path} is no picture that msp drew, so it is not replaced: move it away, or choose another name"
        )
