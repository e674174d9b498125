"""The output of a run: progress bars on standard error, tables on standard output, and plain JSON."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from msp.base.progress import Advance
from msp.base.readable import duration, number, size
from msp.formats.storage import DENSE, Storage
from msp.models.structure import merge_experts
from msp.session.results import DenseInfo

if TYPE_CHECKING:
    from msp.packed.info import PackedInfo
    from msp.plan.decode_table import DecodeTable
    from msp.session.preview import Preview
    from msp.session.results import (
        CompareResult,
        CompareRow,
        ParetoResult,
        PruneResult,
        RecoverResult,
        SearchResult,
        SensitivityResult,
    )

BAR_WIDTH = 24
MOST_NAMES = 3


@final
class RichProgress:
    """Stages as live bars on a terminal, and as one line per finished stage anywhere else.

    Use as a context manager; bars of nested stages disappear when they are done.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._depth = 0
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}", style="dim", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        task = self._bars.add_task("  " * self._depth + name, total=total, info="")
        start, last_info = time.perf_counter(), ""

        def advance(done: int, total: int | None = None, /, **info: object) -> None:
            nonlocal last_info
            last_info = "  ".join(f"{key.replace('_', ' ')} {_figure(value)}" for key, value in info.items())
            self._bars.update(task, completed=done, info=last_info)
            if total is not None:
                self._bars.update(task, total=total)

        self._depth += 1
        try:
            yield advance
        except BaseException:
            self._depth -= 1
            self._bars.stop_task(task)
            raise
        self._depth -= 1
        if self._depth:
            self._bars.remove_task(task)
            return
        self._finish(task)
        if not self._console.is_terminal:
            seconds = time.perf_counter() - start
            self._console.print(f"{name}: {duration(seconds)}  {last_info}".rstrip(), highlight=False, markup=False)

    def _finish(self, task: TaskID) -> None:
        for shown in self._bars.tasks:
            if shown.id == task:
                total = shown.total if shown.total is not None else max(shown.completed, 1)
                self._bars.update(task, total=total, completed=total)
        self._bars.stop_task(task)


def to_json(value: Any) -> str:
    """One line of strict JSON: infinities and NaN, which JSON lacks, become null."""
    return json.dumps(_strict(value), ensure_ascii=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def prune_report(result: PruneResult, output: object = None) -> RenderableType:
    """Dense and pruned side by side, the chosen levels, the linears left dense, the time of each stage."""
    packed, dense = result.bytes["packed"], result.bytes["dense"]
    table = _table("", right=("Dense", "Pruned"))
    table.add_row("Density of the linears", "100 %", f"{result.density:.2%}")
    table.add_row("Perplexity", number(result.perplexity["dense"]), f"[bold]{number(result.perplexity['pruned'])}[/]")
    table.add_row("KL to dense, nats a token", "0", f"[bold]{number(result.kl)}[/]")
    table.add_row("Bytes", size(dense), f"{size(packed)}  ({dense / max(packed, 1):.2f}x smaller)")
    parts: list[RenderableType] = [
        table,
        Text(_spending(result), style="dim"),
        _levels(result.allocation.to_strings()),
    ]
    if result.search_fitness is not None:
        parts.insert(1, Text(_search_fitness(result.search_fitness, result.recipe), style="dim"))
    if result.skipped:
        parts.append(skipped_report(result.skipped))
    parts.append(Text(_costs(result.seconds, result.peak_memory), style="dim"))
    if output is not None:
        parts.append(Text.assemble("Saved to ", (str(output), "bold")))
    return Group(*parts)


def recover_report(result: RecoverResult, output: object = None) -> RenderableType:
    """The figures before and after the training, and what was trained."""
    dense = number(result.perplexity["dense"])
    table = _table("", right=("Dense", "Before", "After"))
    for label, of_dense, figures in (
        ("Held-out loss, nats a token", "", result.held_out_loss),
        ("Perplexity", dense, result.perplexity),
        ("KL to dense, nats a token", "0", result.kl),
    ):
        table.add_row(label, of_dense, number(figures["before"]), f"[bold]{number(figures['after'])}[/]")
    told = f"{result.method}: {result.parameters:,} values trained on {result.tokens:,} tokens; {size(result.bytes)}"
    parts: list[RenderableType] = [table, Text(told, style="dim")]
    if not result.kept:
        parts.append(Text("The training did not lower the held-out loss: the model is as it was.", style="yellow"))
    parts.append(Text(_costs(result.seconds, result.peak_memory), style="dim"))
    if output is not None:
        parts.append(Text.assemble("Saved to ", (str(output), "bold")))
    return Group(*parts)


def preview_report(planned: Preview) -> RenderableType:
    """The plan of a run, and the memory of each of its stages."""
    packed, dense = planned.bytes["packed"], planned.bytes["dense"]
    table = _table("", right=("",))
    table.add_row("Blocks, units, linears", f"{planned.blocks}, {planned.units:,}, {planned.linears:,}")
    table.add_row(f"Budget, {planned.objective}", f"{planned.budget:,} of {planned.dense_cost:,}")
    table.add_row("Bytes, dense and packed", f"{size(dense)}, about {size(packed)}")
    parts: list[RenderableType] = [table]
    memory = planned.memory
    if memory is None:
        parts.append(Text("No memory is predicted for a GPU.", style="dim"))
    else:
        stages = _table("Memory", right=("Bytes",))
        stages.add_row("the process before it loads the weights", size(memory.base))
        stages.add_row("the weights", size(memory.weights))
        for name, count in memory.stages.items():
            stages.add_row(name, size(count))
        stages.add_row("[bold]peak[/]", f"[bold]{size(memory.peak)}[/]")
        parts += [stages, Text(f"{size(planned.available)} are free.", style="dim")]
    if planned.skipped:
        parts.append(skipped_report(planned.skipped))
    return Group(*parts)


def _search_fitness(found: Mapping[str, float], recipe: Mapping[str, Any]) -> str:
    measure = "KL" if recipe["fitness"] == "kl" else "Log-perplexity"
    bytes_ = recipe["search"]["database_bytes"]
    source = "from rank codes" if bytes_ is None else f"from a database of {size(bytes_)}"
    before, after = number(found["candidate"]), number(found["pruned"])
    return f"{measure} on the fitness tokens: {before} as searched, {source}; {after} pruned block by block"


def search_report(result: SearchResult, output: object) -> RenderableType:
    """The cost and the result of the search, the chosen levels, the linears left dense, the time of each stage."""
    table = _table("", right=("",))
    table.show_header = False
    table.add_row("Density of the linears", f"{result.density:.2%}")
    if result.history:
        first, last = result.history[0], result.history[-1]
        table.add_row("Best fitness, first population", number(first["best"]))
        table.add_row("Best fitness found", f"[bold]{number(last['best'])}[/]")
        table.add_row("Candidates measured", f"{last['evaluations']:,}")
        table.add_row("Tokens forwarded", f"{last['tokens']:,}")
        database = result.recipe["search"]["database_bytes"]
        table.add_row("Candidates from", "rank codes" if database is None else f"a database of {size(database)}")
    parts: list[RenderableType] = [
        table,
        Text(_spending(result), style="dim"),
        _levels(result.allocation.to_strings()),
    ]
    if result.skipped:
        parts.append(skipped_report(result.skipped))
    parts.append(Text(_costs(result.seconds, result.peak_memory), style="dim"))
    parts.append(Text.assemble("Written to ", (str(output), "bold")))
    return Group(*parts)


def _spending(result: PruneResult | SearchResult) -> str:
    if result.objective != "nanoseconds":
        return f"{result.spent:,} of a budget of {result.budget:,} {result.objective}"
    spent, budget, dense = (f"{cost / 1e6:.4g}" for cost in (result.spent, result.budget, result.dense_cost))
    return (
        f"All linears decode a token in {spent} of a budget of {budget} ms, dense {dense} ms: predicted, not measured"
    )


def pareto_report(result: ParetoResult, output: object) -> RenderableType:
    """A row for every budget: the share that it keeps, and the fitness reached."""
    table = _table("Budget", right=("Density", "Bytes", "Smaller", f"Fitness ({result.fitness})", "Candidates"))
    described = result.to_json()
    for point in described["points"]:
        smaller = f"{described['dense_bytes'] / point['bytes']:.2f}x"
        cells = [f"{point['density']:.2%}", size(point["bytes"]), smaller, f"[bold]{number(point['loss'])}[/]"]
        table.add_row(point["name"], *cells, f"{point['evaluations']:,}")
    return Group(table, Text.assemble("Written to ", (str(output), "bold")))


def decode_report(table: DecodeTable, output: object) -> RenderableType:
    """Microseconds of a call by pattern, and the ratio to the dense time."""
    shapes = list(table.times)
    shown = _table("Pattern", right=[f"{rows} x {columns}" for rows, columns in shapes], title="Microseconds a token")
    for pattern in dict.fromkeys(name for times in table.times.values() for name in times):
        cells = []
        for times in table.times.values():
            time, dense = times.get(pattern), times[str(DENSE)]
            cells.append("" if time is None else f"{number(time)}  ({dense / time:.2f}x)")
        shown.add_row(pattern, *cells)
    where = ", ".join(f"{key} {value}" for key, value in table.machine.items() if key != "versions")
    return Group(
        shown, Text(f"{table.dtype}, {where}", style="dim"), Text.assemble("Written to ", (str(output), "bold"))
    )


def _levels(allocation: Mapping[str, str]) -> Table:
    table = _table("Pattern", right=("Linears",), title="Patterns (N:M keeps N of M)")
    table.add_column("", width=BAR_WIDTH)
    counts = Counter(allocation.values())
    most = max(counts.values(), default=1)
    for pattern in sorted(counts, key=lambda text: Storage.parse(text).order):
        table.add_row(pattern, str(counts[pattern]), _bar(counts[pattern] / most))
    return table


def skipped_report(skipped: Mapping[str, str]) -> Table:
    """The linears that are never pruned, by the reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        names[reason].append(name)
    table = _table("Left dense", right=(), title=f"{len(skipped)} left as they were")
    table.add_column("Why", overflow="fold")
    for reason, members in names.items():
        rest = f" and {len(members) - MOST_NAMES} more" if len(members) > MOST_NAMES else ""
        table.add_row(Text(", ".join(members[:MOST_NAMES]) + rest), Text(reason))
    return table


def compare_report(result: CompareResult, *, every_seed: bool = False) -> RenderableType:
    """One row per allocator and pruner, the mean over seeds with its spread; the best of each pruner is bold."""
    means = [row for row in result.rows if row.seed == "mean"] or list(result.rows)
    seeds = {row.seed for row in result.rows if row.seed != "mean"}
    shown = list(result.rows) if every_seed else means
    table = _table("Allocator", right=())
    table.add_column("Pruner")
    figures = ("Density", "KL to dense", "Perplexity", "Candidates", "Tokens", "Time")
    for title in (*(("Seed",) if every_seed else ()), *figures):
        table.add_column(title, justify="right")
    best = {row.pruner: min((r.kl for r in means if r.pruner == row.pruner), default=math.nan) for row in means}
    previous = None
    for row in shown:
        if previous is not None and row.pruner != previous:
            table.add_section()
        previous = row.pruner
        cells = [row.allocator, row.pruner, *([str(row.seed)] if every_seed else [])]
        cells += [f"{row.density:.2%}", spread(row, "kl"), spread(row, "perplexity")]
        cells += [f"{row.evaluations:,}", f"{row.tokens:,}", duration(row.seconds)]
        table.add_row(*cells, style="bold" if row in means and row.kl == best[row.pruner] else "")
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.settings.items())
    notes = [
        f"Dense perplexity {number(result.dense_perplexity)}. Lower is better; KL in nats a token. Candidates measured "
        "and tokens forwarded by the search.",
        *([f"Mean over {len(seeds)} seeds ± standard deviation."] if len(seeds) > 1 else []),
        settings,
    ]
    return Group(table, *(Text(note, style="dim") for note in notes if note))


def spread(row: CompareRow, measure: str) -> str:
    """``0.58 ± 0.02`` if the row has a spread, else ``0.58``."""
    value: float = getattr(row, measure)
    deviation = (row.spread or {}).get(measure)
    return number(value) if not deviation else f"{number(value)} ± {number(deviation)}"


def sensitivity_report(result: SensitivityResult) -> RenderableType:
    """Fisher traces by block, then by kind of linear."""
    total = sum(result.traces.values()) or 1.0
    by_block: dict[int, dict[str, float]] = defaultdict(dict)
    by_kind: dict[str, list[float]] = defaultdict(list)
    places = split_names(result.traces)
    for name, trace in result.traces.items():
        block, kind = places[name]
        by_block[block][kind] = trace
        by_kind[merge_experts(kind)].append(trace)
    blocks = _table("Block", right=("Fisher trace", "Share"), title="Sensitivity by depth")
    blocks.add_column("", width=BAR_WIDTH)
    blocks.add_column("Most sensitive linear")
    sums = {block: sum(kinds.values()) for block, kinds in by_block.items()}
    for block, kinds in sorted(by_block.items()):
        top = max(kinds, key=lambda kind: kinds[kind])
        bar = _bar(sums[block] / (max(sums.values()) or 1.0))
        blocks.add_row(str(block), number(sums[block]), f"{sums[block] / total:.1%}", bar, top)
    kinds_table = _table(
        "Kind", right=("Linears", "Mean trace", "Largest", "Share"), title="Sensitivity by kind of linear"
    )
    for kind, traces in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        share = f"{sum(traces) / total:.1%}"
        mean = number(sum(traces) / len(traces))
        kinds_table.add_row(kind, str(len(traces)), mean, number(max(traces)), share)
    return Group(blocks, kinds_table)


def figures_report(figures: Mapping[str, Any]) -> RenderableType:
    """A flat mapping as two columns."""
    table = _table("", right=("",))
    table.show_header = False
    for key, value in figures.items():
        for label, item in _flat(str(key), value):
            table.add_row(label.replace("_", " ").capitalize(), Text(_figure(item)))
    return table


def packed_report(info: PackedInfo) -> RenderableType:
    """Bytes, patterns and recipe of a packed checkpoint."""
    from msp.engine.evolution import UNLIMITED

    table = _table("Bytes", right=("Packed", "Dense", "Smaller by"))
    total, dense = info.packed_bytes + info.other_bytes, info.dense_bytes + info.other_bytes
    for label, packed, before in (
        ("Linears", info.packed_bytes, info.dense_bytes),
        ("Everything else", info.other_bytes, info.other_bytes),
        ("All tensors", total, dense),
    ):
        table.add_row(label, size(packed), size(before), f"{before / max(packed, 1):.2f}x")
    kept = Text(f"{info.kept:,} of {info.weights:,} weights kept: density {info.kept / max(info.weights, 1):.2%}")
    if dense_on_gpu := [linear for linear in info.linears if linear.dense_on_gpu]:
        more = sum(linear.dense_bytes - linear.packed_bytes for linear in dense_on_gpu)
        kept.append(
            f"\n{len(dense_on_gpu)} linears save too little to be packed on a GPU: unpacked once, they take "
            f"{size(more)} more there"
        )
    if prefill := [linear for linear in info.linears if linear.fast_prefill_bytes]:
        limits = sorted(Counter(linear.slower_from_tokens for linear in prefill).items(), reverse=True)
        told = ", ".join(f"{count} linears from about {tokens} tokens on" for tokens, count in limits)
        kept.append(
            "\nOn a GPU, long prompts are slower than with dense weights, by calculation (not measured): "
            f"{told}. msp.fast_prefill(model) unpacks once instead of for every prompt and takes up to "
            f"{size(sum(linear.fast_prefill_bytes for linear in prefill))} more there, beside the "
            f"{size(sum(linear.packed_bytes for linear in prefill))} of these linears"
        )
    made = _table("How it was made", right=())
    made.add_column("", overflow="fold")
    recipe = {**info.recipe, "versions": info.manifest.versions}
    for key, value in recipe.items():
        for label, item in _flat(str(key), value):
            endless = label == "search: generations" and isinstance(item, int) and item >= UNLIMITED
            made.add_row(label.replace("_", " "), Text("until the tokens are spent" if endless else _figure(item)))
    return Group(table, kept, _levels({name: str(storage) for name, storage in info.manifest.storages.items()}), made)


def info_report(found: PackedInfo | DenseInfo, verified: bool = False) -> RenderableType:
    """What a model is; ``verified`` if all its weights were read and compared with their hashes."""
    if isinstance(found, DenseInfo):
        skipped = [skipped_report(found.skipped)] if found.skipped else []
        return Group(
            figures_report({name: value for name, value in found.figures.items()}),
            kinds_report(found.linears),
            *skipped,
        )
    if not verified:
        return packed_report(found)
    kept = "Every tensor is as it was saved."
    fits = "Every tensor fits the format; there are no hashes to compare."
    return Group(packed_report(found), Text(kept if found.manifest.hashes else fits))


def kinds_report(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The linears of a dense model by kind: shape, count, weights, and which group sizes divide them."""
    table = _table("Linears", right=("Out x in", "Count", "Weights"), title="What msp can prune")
    table.add_column("Group sizes")
    for row in rows:
        rows_, columns = row["shape"]
        groups = ", ".join(map(str, row["group_sizes"])) or "none: stays dense"
        table.add_row(row["kind"], f"{rows_} x {columns}", str(row["count"]), f"{row['weights']:,}", groups)
    return table


def split_name(name: str) -> tuple[int, str]:
    """Block index and kind of a linear's name: ``model.layers.3.mlp.up_proj`` -> ``(3, "mlp.up_proj")``."""
    match = re.match(r"(?:.*?\.)??(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (0, name)


def split_names(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """``split_name`` of each; if blocks are in several lists, the list's name goes before the kind."""
    names = list(names)
    lists = {name: match[1] for name in names if (match := re.match(r"(.*?)\.?\d+\.", name))}
    if len({*lists.values()}) < 2:
        return {name: split_name(name) for name in names}
    return {name: (split_name(name)[0], f"{lists.get(name, '')} {split_name(name)[1]}".strip()) for name in names}


def _costs(seconds: Mapping[str, float], peak_memory: int) -> str:
    stages = ", ".join(f"{stage.replace('_', ' ')} {duration(spent)}" for stage, spent in seconds.items())
    memory = f"; peak memory {size(peak_memory)}" if peak_memory else ""
    return f"Time: {stages}{memory}"


def _figure(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


def _flat(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Nested mappings as ``(path, value)`` pairs; values that are not set are left out."""
    if isinstance(value, Mapping):
        for part, item in value.items():
            yield from _flat(key if part == key else f"{key}: {part}", item)
    elif isinstance(value, (list, tuple)):
        yield key, ", ".join(map(str, value))
    elif value is not None:
        yield key, value


def _bar(share: float) -> Text:
    eighths = round(share * BAR_WIDTH * 8)
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style="cyan")


def _table(first: str, *, right: Sequence[str], title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table
