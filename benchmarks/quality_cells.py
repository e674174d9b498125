"""The cells of the quality tables: their settings, and the measurement of one. ``quality.py`` runs them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from msp.base.progress import Advance
    from msp.models.loading import LoadedModel
    from msp.text.token_sets import TokenSets

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MSP_SHARED", ROOT.parent / "shared"))


@dataclass(frozen=True)
class Testbed:
    """A model and its token sets, counted in tokens; each search may forward ``search_tokens``."""

    path: str
    calibration: str
    evaluate: str | None
    calibration_tokens: int
    fitness_tokens: int
    test_tokens: int
    search_tokens: int
    window: int = 256
    patterns: str | None = None


TESTBEDS = {
    "wiki6m": Testbed(
        "models/wiki6m",
        "data/wikipedia-passages.jsonl:text",
        "data/wikitext2-test.txt",
        calibration_tokens=32_768,
        fitness_tokens=32_768,
        test_tokens=51_200,
        search_tokens=2_000_000,
    ),
    "stories260k": Testbed(
        "models/stories260k",
        "data/tinystories-sample.txt",
        None,
        calibration_tokens=16_384,
        fitness_tokens=16_384,
        test_tokens=16_384,
        search_tokens=2_000_000,
        # the 172 inputs of down_proj are no multiple of 8
        patterns=",".join(f"{n}:{m}" for m in (4, 8) for n in range(m + 1)),
    ),
}

OURS = "msp"
FREE = ("uniform", "ramp-best", "owl", "fisher-rank", "fisher-knapsack")
SEARCHES = (OURS, "msp-paper", "evopress")
ALLOCATORS = (*FREE, *SEARCHES)
# The dense model, and weight-only quantisation of it, as whole bits and weights that share a scale.
REFERENCES = {"dense": None, "int8": (8, None), "int4": (4, 64)}
SEEDS = (0, 1, 2)
MAIN_PRUNERS = ("wanda", "sparsegpt")
PRUNERS = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "magnitude": "magnitude", "ria": "RIA"}

# Fields of ``EvolutionOptions`` that a variant of the search changes. "seeds" are the allocators that it starts from.
# "hidden_bytes" is the memory for hidden states that candidates with equal first blocks share.
VARIANTS: dict[str, dict[str, Any]] = {
    "no FIM seeds": {"seeds": ("ramp", "uniform")},
    "crossover": {"crossover_rate": 0.5},
    "no emptied blocks": {"emptied": 0},
    "no sensitivities": {"patience": 0},
    "no racing": {"token_shares": (1.0,), "survivors": ()},
    "no shared prefixes": {"hidden_bytes": 0},
}


@dataclass(frozen=True)
class Cell:
    """One row of a table: an allocator, or a variant of the search, with everything it depends on."""

    model: str = "wiki6m"
    pruner: str = "wanda"
    density: float = 0.25
    group_size: int = 8
    unit: str = "linear"
    compliant: bool = False
    seed: int = 0
    allocator: str = OURS
    variant: str = ""

    @property
    def name(self) -> str:
        """The name of the cell's file."""
        if self.allocator in REFERENCES:
            return f"{self.model}-{self.allocator}"
        words = [self.model, self.pruner, f"{self.density:g}", f"m{self.group_size}", self.unit]
        words += ["compliant"] * self.compliant + [f"seed{self.seed}", self.allocator]
        return "-".join([*words, *self.variant.split()])

    def setting(self, search_tokens: int | None = None) -> dict[str, Any]:
        """Everything that a row depends on; a file with another setting is measured again."""
        bed = TESTBEDS[self.model]
        limit = (search_tokens or bed.search_tokens) if self.allocator in SEARCHES else None
        setting = {**asdict(self), **asdict(bed), "search_tokens": limit, "changed": ""}
        if self.allocator == OURS:
            from msp.allocators.evolution import EvolutionOptions

            setting["changed"] = str({**asdict(EvolutionOptions()), **VARIANTS.get(self.variant, {})})
        return setting


def quality_groups() -> list[Cell]:
    """The cells of the main tables without allocators, the most important first."""
    first = [Cell(pruner=pruner) for pruner in MAIN_PRUNERS]
    others = [Cell(pruner=pruner, density=density) for density in (0.125, 0.5, 0.1875) for pruner in MAIN_PRUNERS]
    quarter = [Cell(pruner="magnitude"), Cell(pruner="ria")]
    stories = [Cell(model="stories260k", density=density) for density in (0.25, 0.5)]
    cells = [*first, *others, *quarter, *stories]
    return cells + [replace(cell, seed=seed) for seed in SEEDS[1:] for cell in cells if cell.density == 0.25]


def pattern_groups() -> list[Cell]:
    """The cells for unit, group size and compliance, without allocators."""
    kinds = [("linear", False), ("block", False), ("linear", True)]
    return [Cell(group_size=m, unit=unit, compliant=compliant) for m in (8, 4, 16) for unit, compliant in kinds]


def compliant_sizes(largest: int) -> list[int]:
    """Group sizes that a compliant cell mixes: at most two of each group stay, so 16 alone could not keep a quarter."""
    return [size for size in (4, 8, 16) if size <= largest]


PATTERN_ALLOCATORS = ("uniform", "fisher-rank", OURS)


def cells_of(table: str) -> list[Cell]:
    """The cells of ``quality``, ``patterns`` or ``ablation``, in the order of their measurement."""
    if table == "quality":
        references = [Cell(model=model, allocator=name) for model in TESTBEDS for name in REFERENCES]
        return references + [replace(cell, allocator=name) for cell in quality_groups() for name in ALLOCATORS]
    if table == "patterns":
        return [replace(cell, allocator=name) for cell in pattern_groups() for name in PATTERN_ALLOCATORS]
    return [Cell(seed=seed, variant=variant) for seed in SEEDS for variant in ("", *VARIANTS)]


TABLES = ("quality", "patterns", "ablation")


def read(cell: Cell, results: Path, search_tokens: int | None = None) -> dict[str, Any] | None:
    """The result of a cell; None if there is none with its current setting."""
    path = results / f"{cell.name}.json"
    row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return row if row and row["setting"] == cell.setting(search_tokens) else None


class CpuClock:
    """Processor seconds of each stage of a run; a search adds those of the runs that it continues."""

    def __init__(self, spent: Path) -> None:
        self._spent = spent
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        from msp.base.files import write_text

        start = time.process_time()
        if name == "Search" and self._spent.exists():
            start -= float(self._spent.read_text())

        def advance(done: int, total: int | None = None, /, **info: object) -> None:
            if name == "Search":
                write_text(self._spent, str(time.process_time() - start))

        yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def measure(cell: Cell, work: Path, search_tokens: int | None = None) -> dict[str, Any]:
    """Measure one cell in this process, on one thread; a search continues from its checkpoint in ``work``."""
    import torch

    torch.set_num_threads(1)
    setting = cell.setting(search_tokens)
    figures = _reference(cell, setting) if cell.allocator in REFERENCES else _pruned(cell, setting, work)
    return {"machine": _machine(), "setting": setting, **figures}


def _pruned(cell: Cell, setting: dict[str, Any], work: Path) -> dict[str, Any]:
    import msp

    folder = work / f"{cell.name}-{_engine()}"
    folder.mkdir(parents=True, exist_ok=True)
    clock = CpuClock(folder / "seconds.txt")
    asked = ("pruner", "group_size", "unit", "seed", "patterns", "window", "search_tokens")
    tokens = ("calibration_tokens", "fitness_tokens", "test_tokens")
    if cell.compliant:
        sizes = compliant_sizes(cell.group_size)
        setting = setting | {"patterns": ",".join(f"{n}:{m}" for m in sizes for n in range(3) if n or m == 4)}
    options = dict(VARIANTS.get(cell.variant, {}))
    memory = {"hidden_bytes": options.pop("hidden_bytes")} if "hidden_bytes" in options else {}
    result = msp.prune(
        SHARED / setting["path"],
        sparsity=1 - cell.density,
        allocator=_variant(cell.variant, options) if options else cell.allocator,
        calibration=_source(setting["calibration"], folder),
        evaluate=setting["evaluate"] and str(SHARED / setting["evaluate"]),
        device="cpu",
        work_dir=folder,
        resume=True,
        progress=clock,
        **memory,
        **{name: setting[name] for name in (*asked, *tokens)},
    )
    return {
        "kl": result.kl,
        "perplexity": result.perplexity["pruned"],
        "bytes": result.bytes["packed"],
        "density": result.density,
        "seconds": clock.seconds,
        "tokens": result.history[-1]["tokens"] if result.history else 0,
        "history": result.history,
        "search": result.recipe["search"],
        "allocation": result.allocation.to_strings(),
    }


def _engine() -> str:
    """A name for the code of the search: a search does not continue from a checkpoint of other code."""
    digest = hashlib.sha256()
    rooms = ("engine", "compressions", "allocators")
    paths = [path for room in rooms for path in sorted((ROOT / "msp" / room).glob("*.py"))]
    assert len(paths) > 20, "the rooms of the search have moved"
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _variant(name: str, changed: dict[str, Any]) -> str:
    """The search of ``msp`` with some options ``changed``, as an allocator with a name."""
    from msp.allocators import Allocated, Problem, get_allocator, register_allocator
    from msp.allocators.evolution import fisher_seeds, search
    from msp.engine.evolution import EvolutionOptions

    label = f"{OURS}, {name}"
    starts = changed.pop("seeds", None)

    class Variant:
        name = label

        def allocate(self, problem: Problem) -> Allocated:
            if starts is None:
                seeds = fisher_seeds(problem)
            else:
                seeds = [get_allocator(start).allocate(problem).levels for start in starts]
            return search(problem, seeds, replace(EvolutionOptions(), **changed))

    return register_allocator(Variant).name


def _source(source: str, folder: Path) -> str:
    """The stories one by one, as in the model's training: each a document, paragraphs on single lines."""
    path = SHARED / source
    if path.suffix != ".txt":
        return str(path)
    paragraphs = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    stories: list[str] = []
    for paragraph in paragraphs:
        if not stories or re.match(r"Once upon a time|Once there|Once,|One day", paragraph):
            stories.append(paragraph)
        else:
            stories[-1] += "\n" + paragraph
    target = folder / "stories.jsonl"
    target.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
    return f"{target}:text"


def _reference(cell: Cell, setting: dict[str, Any]) -> dict[str, Any]:
    """The dense model, or its weight-only quantisation, on the same test tokens."""
    import torch

    from msp.evidence.evaluate import DenseReference
    from msp.models.loading import load_model
    from msp.models.structure import find_structure
    from msp.session.workbench import batch_size

    device = torch.device("cpu")
    loaded = load_model(SHARED / setting["path"], device=device)
    tokens = token_sets(loaded, setting)
    reference = DenseReference(loaded.model, tokens.test, batch_size=batch_size(device, tokens.window))
    unique = {tensor.data_ptr(): tensor.numel() for tensor in loaded.model.state_dict().values()}
    stored = sum(unique.values()) * loaded.stored_dtype.itemsize
    scheme = REFERENCES[cell.allocator]
    for linear in find_structure(loaded.model).linears if scheme else ():
        values, size = quantised(linear.weight, *scheme, loaded.stored_dtype)
        stored += size - linear.weight.numel() * loaded.stored_dtype.itemsize
        linear.weight.copy_(values)
    quality = reference.measure(loaded.model)
    return {"kl": quality.kl, "perplexity": quality.perplexity, "bytes": stored}


def token_sets(loaded: LoadedModel, setting: dict[str, Any]) -> TokenSets:
    """The tokens that `prune` would draw, without the random tokens that it adds for a search."""
    import tempfile

    from msp.text.token_sets import make_token_sets

    with tempfile.TemporaryDirectory() as folder:
        return make_token_sets(
            _source(setting["calibration"], Path(folder)),
            loaded.tokenizer,
            loaded.model.get_input_embeddings().num_embeddings,
            evaluate=setting["evaluate"] and str(SHARED / setting["evaluate"]),
            **{
                name: setting[name]
                for name in ("window", "calibration_tokens", "fitness_tokens", "test_tokens", "seed")
            },
        )


def quantised(weight: Tensor, bits: int, group: int | None, stored: dtype) -> tuple[Tensor, int]:
    """``weight [R, K]`` rounded to the nearest of ``2^bits`` symmetric levels, and the bytes of codes and scales.

    A scale in the ``stored`` dtype is shared by ``group`` weights along the input, or by a whole output channel.
    """
    from torch.nn import functional

    rows, columns = weight.shape
    top = 2 ** (bits - 1) - 1
    grouped = functional.pad(weight.float(), (0, -columns % (group or columns))).unflatten(1, (-1, group or columns))
    scale = (grouped.abs().amax(-1, keepdim=True) / top).to(stored).float()
    codes = (grouped / scale.clamp_min(1e-12)).round().clamp(-top - 1, top)
    values = (codes * scale).flatten(1)[:, :columns]
    return values.to(weight.dtype), rows * math.ceil(columns * bits / 8) + scale.numel() * stored.itemsize


def _machine() -> dict[str, Any]:
    import torch
    from runner import processor

    import msp
    from msp import _cpu

    versions = {"msp": msp.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"processor": processor(), "isa": _cpu.isa(), "threads": torch.get_num_threads(), "versions": versions}
