"""The tables and the picture that ``quality.py`` makes from the files of its cells; a missing cell is marked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quality_cells import (
    ALLOCATORS,
    FREE,
    MAIN_PRUNERS,
    OURS,
    PATTERN_ALLOCATORS,
    PRUNERS,
    REFERENCES,
    ROOT,
    SEEDS,
    TESTBEDS,
    VARIANTS,
    Cell,
    cells_of,
    compliant_sizes,
    pattern_groups,
    quality_groups,
    read,
)
from runner import write_table

Row = dict[str, Any]
Rows = dict[int, Row]
"""The results of one cell, by seed."""
NOTHING = "not measured yet"
# At this density and below, the search should be this much better than the allocators that do not search.
DENSITY, MARGIN = 0.25, 0.15
# The share of a rival search's tokens after which this search should reach the rival's last KL.
SHARES = {"msp-paper": 0.25, "evopress": 0.5}


@dataclass(frozen=True)
class Results:
    """The cells' files in a folder."""

    folder: Path
    search_tokens: int | None = None

    def row(self, cell: Cell) -> Row | None:
        return read(cell, self.folder, self.search_tokens)

    def seeds(self, cell: Cell, **changes: Any) -> Rows:
        """The results of a cell for every seed that was measured."""
        found = {seed: self.row(replace(cell, seed=seed, **changes)) for seed in SEEDS}
        return {seed: row for seed, row in found.items() if row is not None}


def mean(rows: Rows, value: Callable[[Row], float]) -> float:
    return statistics.fmean(map(value, rows.values()))


def told(rows: Rows, name: str, digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    values = [row[name] for row in rows.values()]
    if not values:
        return NOTHING
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def lowest(rows: dict[str, Rows], name: str, digits: int) -> dict[str, str]:
    """``told`` for each, the lowest mean in bold."""
    means = {key: mean(found, lambda row: row[name]) for key, found in rows.items() if found}
    best = min(means.values(), default=None)
    return {
        key: f"**{told(found, name, digits)}**" if found and means[key] == best else told(found, name, digits)
        for key, found in rows.items()
    }


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def seeds_told(rows: Iterable[Rows]) -> str:
    counts = sorted({len(found) for found in rows if found}) or [0]
    words = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return "one seed" if counts == [1] else f"{words} seeds"


def readme_table(results: Results) -> str:
    """The table of the main density: all allocators with two pruners, and models of a similar number of bytes."""
    found = {
        pruner: {name: results.seeds(Cell(pruner=pruner), allocator=name) for name in ALLOCATORS}
        for pruner in MAIN_PRUNERS
    }
    columns = [lowest(found[pruner], *figure) for pruner in MAIN_PRUNERS for figure in (("kl", 3), ("perplexity", 1))]
    sizes = {name: next((f"{r['bytes'] / 1e6:.2f}" for r in found["wanda"][name].values()), "") for name in ALLOCATORS}
    body = [[name, sizes[name], *(column[name] for column in columns)] for name in ALLOCATORS]
    for name in REFERENCES:
        row = results.row(Cell(allocator=name))
        figures = [f"{row['kl']:.3g}", f"{row['perplexity']:.1f}"] if row else [NOTHING, NOTHING]
        body.append([f"*{name}*", f"{row['bytes'] / 1e6:.2f}" if row else "", *figures, "", ""])
    head = ["allocator", "MB"] + [
        f"{PRUNERS[pruner]}: {what}" for pruner in MAIN_PRUNERS for what in ("KL", "perplexity")
    ]
    seeds = seeds_told(rows for by_name in found.values() for rows in by_name.values())
    return f"wiki6m at density 25 %, groups of 8, {seeds}; in italics what is not pruned:\n\n{markdown(head, body)}"


def quality_page(results: Results) -> str:
    """Every model's cells, the claims, and the models that were not pruned."""
    parts = []
    for model in TESTBEDS:
        groups = [group for group in quality_groups() if group.model == model and group.seed == SEEDS[0]]
        groups.sort(key=lambda group: (list(PRUNERS).index(group.pruner), -group.density))
        found = {group: {name: results.seeds(group, allocator=name) for name in ALLOCATORS} for group in groups}
        parts.append(f"### {model}\n\n{tokens_told(model)}\n{reference_table(results, model)}")
        for title, name, digits in (("KL to the dense model", "kl", 3), ("Perplexity", "perplexity", 1)):
            body = []
            for group, rows in found.items():
                sizes = [row["bytes"] for by_seed in rows.values() for row in by_seed.values()]
                size = megabytes(statistics.fmean(sizes)) if sizes else ""
                body.append([*group_told(group), size, *lowest(rows, name, digits).values()])
            parts.append(f"{title}:\n\n" + markdown(["pruner", "density", "packed", *ALLOCATORS], body))
        parts.append("What is claimed of `msp`:\n\n" + claims_table(found))
    if results.seeds(Cell()):
        parts.append("![KL and perplexity against bytes, a line for each allocator](quality.png)\n")
    return "\n".join([*parts, made_by(results)])


def tokens_told(model: str) -> str:
    bed = TESTBEDS[model]
    sizes = (
        f"{bed.calibration_tokens:,} for calibration, {bed.fitness_tokens:,} for fitness, {bed.test_tokens:,} for test"
    )
    return f"Tokens: {sizes}, windows of {bed.window}; each search forwards {bed.search_tokens:,}.\n"


def group_told(group: Cell) -> list[str]:
    return [PRUNERS[group.pruner], f"{group.density:.2%}".replace(".00%", "%")]


def reference_table(results: Results, model: str) -> str:
    body = []
    for name in REFERENCES:
        row = results.row(Cell(model=model, allocator=name))
        figures = [f"{row['kl']:.3g}", f"{row['perplexity']:.1f}", megabytes(row["bytes"])] if row else [NOTHING] * 3
        body.append([name, *figures])
    return markdown(["not pruned", "KL", "perplexity", "all weights"], body)


def claims_table(found: dict[Cell, dict[str, Rows]]) -> str:
    """Cell by cell, on the seeds of all allocators: whether each claim holds, and by how much."""
    head = ["pruner", "density", "lowest KL", f"{MARGIN:.0%} below what does not search"]
    head += [f"tokens to the KL of `{rival}` (at most {share:.0%})" for rival, share in SHARES.items()]
    body = []
    for group, rows in found.items():
        common = set.intersection(*(set(by_seed) for by_seed in rows.values()))
        if not common:
            body.append([*group_told(group), *[NOTHING] * (2 + len(SHARES))])
            continue
        same = {name: {seed: by_seed[seed] for seed in sorted(common)} for name, by_seed in rows.items()}
        kl = {name: mean(by_seed, lambda row: row["kl"]) for name, by_seed in same.items()}
        others = {name: value for name, value in kl.items() if name != OURS}
        best = min(others, key=others.__getitem__)
        free = min(FREE, key=kl.__getitem__)
        below = 1 - kl[OURS] / kl[free]
        line = [f"yes, by {1 - kl[OURS] / kl[best]:.0%}" if kl[OURS] < kl[best] else f"no: {best}"]
        asked = group.density <= DENSITY
        than = f"{abs(below):.1%} {'below' if below > 0 else 'above'} {free}"
        line.append(f"{yes(below >= MARGIN) if asked else 'not claimed'}: {than}")
        for rival, limit in SHARES.items():
            line.append(share_told([share_to_reach(same[OURS][s], same[rival][s]) for s in sorted(common)], limit))
        body.append([*group_told(group), *line])
    return markdown(head, body)


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def share_to_reach(ours: Row, rival: Row) -> float | None:
    """Tokens until the search is as good on the fitness tokens as the rival at its end, over all of the rival's."""
    target = rival["history"][-1]["best"]
    spent = (step["tokens"] for step in ours["history"] if step["best"] <= target)
    reached = next(spent, None)
    return None if reached is None else reached / rival["tokens"]


def share_told(shares: Sequence[float | None], limit: float) -> str:
    reached = [share for share in shares if share is not None]
    if len(reached) < len(shares):
        return f"no: not reached with {len(shares) - len(reached)} of {len(shares)} seeds"
    share = statistics.fmean(reached)
    return f"{yes(share <= limit)}: {share:.0%}"


def pattern_table(results: Results) -> str:
    """The table of unit, group size and compliance at one density."""
    body = []
    for group in sorted(
        pattern_groups(), key=lambda group: (group.unit != "linear", group.compliant, group.group_size)
    ):
        rows = [results.seeds(group, allocator=name) for name in PATTERN_ALLOCATORS]
        sizes = [row["bytes"] for row in rows[-1].values()]
        unit = group.unit + (", compliant" if group.compliant else "")
        size = megabytes(statistics.fmean(sizes)) if sizes else ""
        mixed = compliant_sizes(group.group_size) if group.compliant else [group.group_size]
        body.append([unit, ", ".join(map(str, mixed)), size, *(told(by_seed, "kl", 3) for by_seed in rows)])
    return markdown(["unit", "M", "packed", *(f"KL: {name}" for name in PATTERN_ALLOCATORS)], body)


def ablation_table(results: Results) -> str:
    """The worth of each part of the search: results without it, on the seeds that both were measured with."""
    whole = results.seeds(Cell())
    body = [["all parts", told(whole, "kl", 3), "", told_time(whole), ""]]
    for variant in VARIANTS:
        rows = results.seeds(Cell(variant=variant))
        common = {seed: whole[seed] for seed in rows if seed in whole}
        if not common:
            body.append([variant, told(rows, "kl", 3), NOTHING, told_time(rows), NOTHING])
            continue
        same = {seed: rows[seed] for seed in common}
        more = mean(same, lambda row: row["kl"]) / mean(common, lambda row: row["kl"]) - 1
        slower = mean(same, search_time) / mean(common, search_time)
        body.append([variant, told(rows, "kl", 3), f"{more:+.1%}", told_time(rows), f"{slower:.2f} x"])
    return markdown(["search", "KL on test tokens", "against all parts", "time of search", "against all parts"], body)


def search_time(row: Row) -> float:
    """The time of the search in units of the evaluation of both models by the same process, so machines compare."""
    seconds = row["seconds"]
    return float(seconds["Search"] / (seconds["Dense test predictions"] + seconds["Evaluating"]))


def told_time(rows: Rows) -> str:
    return f"{mean(rows, search_time):.1f}" if rows else NOTHING


def made_by(results: Results) -> str:
    """The code and the machines that made the files."""
    found = [row for table in ("quality", "patterns") for cell in cells_of(table) if (row := results.row(cell))]
    if not found:
        return ""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
    machines = ", ".join(dict.fromkeys(f"{r['machine']['processor']} (`{r['machine']['isa']}`)" for r in found))
    return f"Made by commit {commits} on {machines}, one thread.\n"


def picture(results: Results, path: Path) -> None:
    """KL and perplexity against packed bytes: a line for each allocator, quantisation of the dense model as points."""
    from matplotlib.figure import Figure

    from msp.base.files import replacing
    from msp.show.pictures import COLOURS, DPI, MARKERS

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="col")
    for line, pruner in zip(panels, MAIN_PRUNERS, strict=True):
        groups = sorted(
            (g for g in quality_groups() if g == Cell(pruner=pruner, density=g.density)), key=lambda g: g.density
        )
        for axes, name, label in zip(
            line, ("kl", "perplexity"), ("KL to dense, nats a token", "perplexity"), strict=True
        ):
            for index, allocator in enumerate(ALLOCATORS):
                rows = [found for group in groups if (found := results.seeds(group, allocator=allocator))]
                axes.plot(
                    [mean(by_seed, lambda row: row["bytes"] / 1e6) for by_seed in rows],
                    [mean(by_seed, lambda row, name=name: row[name]) for by_seed in rows],
                    label=allocator,
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
                    linewidth=2.5 if allocator == OURS else 1,
                )
            for scheme in REFERENCES:
                row = results.row(Cell(allocator=scheme))
                if row and row[name] > 0:
                    axes.plot(row["bytes"] / 1e6, row[name], "*", color="black", markersize=10)
                    axes.annotate(scheme, (row["bytes"] / 1e6, row[name]), (5, 5), textcoords="offset points")
            axes.set_yscale("log")
            axes.set_ylabel(label)
            axes.set_title(f"wiki6m, {PRUNERS[pruner]}", loc="left")
            axes.grid(which="both", color="#E5E5E5", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("all weights as stored, MB")
    panels[0][1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with replacing(path) as new:
        figure.savefig(new, dpi=DPI, format="png")


def write(folder: Path) -> None:
    """Write the tables into the pages; README and picture wait for the first cell."""
    results = Results(folder)
    write_table(ROOT / "docs" / "quality.md", "quality", quality_page(results))
    write_table(ROOT / "docs" / "quality.md", "patterns", pattern_table(results))
    write_table(ROOT / "docs" / "search-notebook.md", "ablation", ablation_table(results))
    if results.seeds(Cell()):
        write_table(ROOT / "README.md", "quality", readme_table(results))
        picture(results, ROOT / "docs" / "quality.png")
