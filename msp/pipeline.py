"""The whole way from a dense model to a packed one, and comparisons of such ways."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from msp import __version__
from msp.allocators import Allocated, SearchSettings, get_allocator
from msp.checkpoint import check_output, replace_linears, save_packed
from msp.data import DEFAULT_CALIBRATION, DEFAULT_EVALUATION, TokenSets, make_token_sets, read_windows
from msp.errors import MspError, UsageError
from msp.evaluate import DenseReference, Quality, perplexity
from msp.model import LoadedModel, Structure, check_finite, device_of, find_structure, load_model
from msp.ops import check_environment
from msp.patterns import parse_sparsity
from msp.plan import Goal, PatternRules, Plan, make_plan, parse_bytes
from msp.progress import NoProgress, Progress
from msp.pruners import get_pruner
from msp.results import CompareResult, CompareRow, PruneResult, SensitivityResult, mean_rows
from msp.sensitivity import fisher_traces
from msp.sparse_linear import SparseLinear, note_pattern
from msp.workbench import Workbench, batch_size

FITNESS = ("kl", "perplexity")


@dataclass(frozen=True)
class PruneOptions:
    """What ``prune`` and ``compare`` share; see the README for the words.

    Attributes:
        sparsity: share of the linears' weights to remove, in (0, 1); or else
        budget_bytes: what all tensors of the packed model may take: a number, or a text like ``"300MB"``.
        group_size: M of N:M: 4, 8, 16 or 32.
        patterns: the patterns linears may have, like ``"1:8,2:8,4:8"``, in the place of all of one group size.
        keep: pinned linears, like ``"layers.0.*=4:8,.*down_proj=dense"``, see ``PatternRules``.
        allocator, pruner: registered names.
        unit: ``linear`` or ``block``: what gets one N.
        calibration: source of calibration and fitness tokens; the default is C4 from the hub.
        evaluate: source of the test tokens; without it they are held out of ``calibration``.
        window: tokens per sequence; the default is the model's context, at most 2048.
        calibration_tokens, fitness_tokens, test_tokens: sizes of the token sets, rounded down to windows.
        fitness: ``kl`` (to the dense model) or ``perplexity``, what a search minimises.
        fitness_noise: share of the fitness tokens replaced by random ones of theirs, in [0, 1), for ``kl``: a
            search on clean text alone fits that kind of text (docs/search.md).
        evaluations: candidates a search may measure; without it the allocator's own number, 970 for ``msp``.
        search_tokens: no generation of a search begins once it has forwarded this many tokens; without
            ``evaluations`` it is all that ends the search.
        seed: of the token draw and the search.
        dtype, device: as in ``load_model``; ``auto`` takes a GPU where there is one.
        work_dir: where a search keeps its checkpoint; ``resume`` goes on from it.
    """

    sparsity: float | None
    budget_bytes: int | str | None = None
    group_size: int = 8
    patterns: str | None = None
    keep: str | None = None
    allocator: str = "msp"
    pruner: str = "wanda"
    unit: str = "linear"
    calibration: str | None = None
    evaluate: str | None = None
    window: int | None = None
    calibration_tokens: int = 65_536
    fitness_tokens: int = 32_768
    test_tokens: int = 32_768
    fitness: str = "kl"
    fitness_noise: float = 0.15
    evaluations: int | None = None
    search_tokens: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    work_dir: Path | None = None
    resume: bool = False

    def check(self) -> None:
        """Raise ``UsageError`` for anything wrong that can be known without the model."""
        if (self.sparsity is None) == (self.budget_bytes is None):
            raise UsageError("how much may stay is said by a sparsity or by budget_bytes, one of them")
        if self.sparsity is not None:
            parse_sparsity(self.sparsity)
        if self.budget_bytes is not None:
            parse_bytes(self.budget_bytes)
        _ = self.rules
        get_allocator(self.allocator)
        get_pruner(self.pruner)
        if self.fitness not in FITNESS:
            raise UsageError(f"fitness {self.fitness!r} is not one of {', '.join(FITNESS)}")
        if not 0 <= self.fitness_noise < 1:
            raise UsageError(f"fitness noise {self.fitness_noise:g} is outside [0, 1)")
        if self.evaluations is not None and self.evaluations < 1:
            raise UsageError(f"{self.evaluations} evaluations: a search needs at least one")
        if self.search_tokens is not None and self.search_tokens < 1:
            raise UsageError(f"{self.search_tokens} search tokens: a search needs at least one")
        if self.resume and self.work_dir is None:
            raise UsageError("resume needs work_dir, the folder with the checkpoint of the search")

    @property
    def rules(self) -> PatternRules:
        return PatternRules.parse(self.group_size, self.patterns, self.keep)

    @property
    def search(self) -> SearchSettings:
        checkpoint = self.work_dir / "search.json" if self.work_dir is not None else None
        return SearchSettings(self.evaluations, self.search_tokens, checkpoint, self.resume)


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class _Opened:
    """A dense model with its structure and where it runs."""

    loaded: LoadedModel
    structure: Structure
    device: torch.device

    @property
    def model(self) -> Any:
        return self.loaded.model

    def tokens(self, options: PruneOptions, seed: int) -> TokenSets:
        return make_token_sets(
            options.calibration or DEFAULT_CALIBRATION,
            self.loaded.tokenizer,
            _vocabulary(self.model),
            evaluate=options.evaluate,
            window=_window(self.model, options.window),
            calibration_tokens=options.calibration_tokens,
            fitness_tokens=options.fitness_tokens,
            # The perplexity of random tokens says nothing; the divergence from the dense model does.
            fitness_noise=options.fitness_noise if options.fitness == "kl" else 0.0,
            test_tokens=options.test_tokens,
            seed=seed,
        )

    def plan(self, options: PruneOptions) -> Plan:
        return make_plan(self.structure, self._goal(options), options.rules, unit=options.unit)

    def _goal(self, options: PruneOptions) -> Goal:
        if options.budget_bytes is None:
            assert options.sparsity is not None
            return Goal(parse_sparsity(options.sparsity))
        dtype = self.loaded.stored_dtype
        in_linears = sum(linear.weight.numel() for linear in self.structure.linears) * dtype.itemsize
        others = _tensor_bytes(self.model, dtype) - in_linears
        return Goal(None, parse_bytes(options.budget_bytes), others, dtype)

    def bench(self, plan: Plan, tokens: TokenSets, progress: Progress) -> Workbench:
        return Workbench(
            self.model,
            self.structure,
            plan,
            tokens,
            name=self.loaded.source,
            stored_dtype=self.loaded.stored_dtype,
            device=self.device,
            progress=progress,
        )

    def test_reference(self, tokens: TokenSets, progress: Progress) -> DenseReference:
        size = batch_size(self.device, tokens.window)
        return DenseReference(
            self.model, tokens.test, batch_size=size, progress=progress, label="Dense test predictions"
        )


def _open(model: Any, options: PruneOptions, tokenizer: Any, progress: Progress) -> _Opened:
    device = _device(options.device)
    if isinstance(model, (str, Path)):
        with progress.stage("Loading the model"):
            loaded = load_model(model, dtype=options.dtype, device=device)
    else:
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        loaded = LoadedModel(model.eval(), tokenizer, name, next(model.parameters()).dtype)
        device = device_of(model)
    if any(isinstance(module, SparseLinear) for module in loaded.model.modules()):
        raise MspError(f"{loaded.source} is packed already; start from the dense model")
    structure = find_structure(loaded.model)
    check_finite(structure.linears)
    return _Opened(loaded, structure, device)


def prune(
    model: Any,
    *,
    sparsity: float | None = None,
    output: str | Path | None = None,
    force: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a causal LM to N:M sparsity with a level per unit, and pack it.

    Args:
        model: a directory, a hub id, or a model object (which is packed in place).
        sparsity: share of the linears' weights to remove, in (0, 1); or ``budget_bytes`` among the options.
        output: directory to save the packed model to; ``force`` replaces one that is there.
        tokenizer: to go with a model object.
        progress: hears of every stage.
        options: the other fields of ``PruneOptions``.

    Raises:
        UsageError: a wrong request (before the model is loaded where that can be known).
        MspError: a model, text or place that does not serve.
    """
    settings = _options(sparsity, options)
    if output is not None:
        check_output(output, force)
    listener = progress or NoProgress()
    clock = _Stopwatch()
    with clock("load"):
        opened = _open(model, settings, tokenizer, listener)
        plan = opened.plan(settings)
        tokens = opened.tokens(settings, settings.seed)
    pruner, allocator = get_pruner(settings.pruner), get_allocator(settings.allocator)
    bench = opened.bench(plan, tokens, listener)
    with clock("evaluate"):
        reference = opened.test_reference(tokens, listener)
    with clock("allocate"):
        problem = bench.problem(pruner, seed=settings.seed, fitness=settings.fitness, search=settings.search)
        found = allocator.allocate(problem)
        allocation = problem.allocation(found.levels)
    dense_bytes = _tensor_bytes(opened.model, opened.loaded.stored_dtype)
    with ExitStack() as stack:
        with clock("prune"):
            pruned = stack.enter_context(bench.pruned(allocation, pruner))
        with clock("evaluate"):
            quality = reference.measure(pruned, progress=listener)
        packed = {name: module.packed for name, module in pruned.named_modules() if isinstance(module, SparseLinear)}
    for name, pattern in allocation.items():
        if pattern.is_dense:
            note_pattern(opened.model.get_submodule(name), pattern)
    replace_linears(opened.model, packed)
    bytes_ = {"dense": dense_bytes, "packed": _tensor_bytes(opened.model, opened.loaded.stored_dtype)}
    recipe = _recipe(settings, opened, tokens, plan, found)
    recipe |= {"perplexity": _both(reference.quality, quality), "kl": quality.kl, "bytes": bytes_}
    if output is not None:
        with clock("save"), _in_dtype(opened.model, opened.loaded.stored_dtype):
            save_packed(opened.model, opened.loaded.tokenizer, output, recipe=recipe, force=force)
    return PruneResult(
        density=(plan.skipped_weights + problem.kept(found.levels)) / plan.total_weights,
        kept=plan.skipped_weights + problem.kept(found.levels),
        budget=plan.limit,
        objective=plan.objective,
        spent=plan.fixed_cost + problem.cost(found.levels),
        allocation=allocation,
        skipped=dict(plan.skipped),
        perplexity=_both(reference.quality, quality),
        kl=quality.kl,
        bytes=bytes_,
        seconds=clock.seconds,
        peak_memory=_peak_memory(),
        history=[asdict(step) for step in found.history],
        sensitivities=bench.traces,
        recipe=recipe,
        model=opened.model,
        tokenizer=opened.loaded.tokenizer,
    )


def compare(
    model: Any,
    *,
    sparsity: float | None = None,
    allocators: Sequence[str],
    pruners: Sequence[str] = ("wanda",),
    seeds: Sequence[int] = (0, 1, 2),
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> CompareResult:
    """Measure every allocator with every pruner on the same model, budget and test tokens.

    The seed draws calibration and fitness tokens and steers the search; test tokens never depend on it.
    Arguments and errors as for ``prune``; the model is dense again afterwards.
    """
    settings = _options(sparsity, options)
    chosen = [(name, get_allocator(name)) for name in allocators]
    methods = [(name, get_pruner(name)) for name in pruners]
    if not chosen or not methods or not seeds:
        raise UsageError("compare needs at least one allocator, one pruner and one seed")
    listener = progress or NoProgress()
    opened = _open(model, settings, tokenizer, listener)
    plan = opened.plan(settings)
    rows: list[CompareRow] = []
    reference: DenseReference | None = None
    with listener.stage("Rows", len(chosen) * len(methods) * len(seeds)) as advance:
        for seed in seeds:
            tokens = opened.tokens(settings, seed)
            reference = reference or opened.test_reference(tokens, listener)
            bench = opened.bench(plan, tokens, listener)
            for pruner_name, pruner in methods:
                problem = bench.problem(pruner, seed=seed, fitness=settings.fitness, search=settings.search)
                for name, allocator in chosen:
                    start = time.perf_counter()
                    found = allocator.allocate(problem)
                    with bench.pruned(problem.allocation(found.levels), pruner) as pruned:
                        seconds = time.perf_counter() - start
                        quality = reference.measure(pruned, progress=listener)
                    rows.append(
                        CompareRow(
                            name,
                            pruner_name,
                            seed,
                            density=(plan.skipped_weights + problem.kept(found.levels)) / plan.total_weights,
                            kl=quality.kl,
                            perplexity=quality.perplexity,
                            evaluations=found.evaluations,
                            seconds=seconds,
                            tokens=found.tokens,
                            history=[asdict(step) for step in found.history],
                        )
                    )
                    advance(len(rows), allocator=name, pruner=pruner_name, seed=seed, kl=quality.kl)
    assert reference is not None
    described: dict[str, Any] = {"model": opened.loaded.source, **_budget_settings(settings)}
    described |= {"unit": settings.unit, "fitness": settings.fitness, **tokens.sources, "seed": list(seeds)}
    return CompareResult([*rows, *mean_rows(rows)], reference.quality.perplexity, described)


def sensitivity(
    model: Any, *, tokenizer: Any = None, progress: Progress | None = None, **options: Any
) -> SensitivityResult:
    """The Fisher trace of every linear, on the calibration tokens."""
    settings = _options(0.5, {"fitness_tokens": 0, "test_tokens": 0, **options})
    listener = progress or NoProgress()
    opened = _open(model, settings, tokenizer, listener)
    tokens = opened.tokens(settings, settings.seed)
    linears = opened.structure.linears
    with listener.stage("Fisher traces", len(tokens.calibration)) as advance:
        traces = fisher_traces(opened.model, linears, tokens.calibration, progress=advance)
    blocks = [sum(traces[linear.name] for linear in block.linears) for block in opened.structure.blocks]
    return SensitivityResult(
        traces,
        blocks,
        {linear.name: linear.shape for linear in linears},
        {linear.name: linear.kind for linear in linears},
        {"model": opened.loaded.source, **tokens.sources},
    )


def evaluate(
    model: str | Path,
    *,
    evaluate: str = DEFAULT_EVALUATION,
    reference: str | Path | None = None,
    window: int | None = None,
    test_tokens: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of a dense or packed model on a text, and KL to a dense ``reference`` if one is given."""
    listener = progress or NoProgress()
    place = _device(device)
    loaded = load_model(model, dtype=dtype, device=place)
    length = _window(loaded.model, window)
    windows = read_windows(evaluate, loaded.tokenizer, _vocabulary(loaded.model), window=length, tokens=test_tokens)
    size = batch_size(place, length)
    if reference is None:
        quality = perplexity(loaded.model, windows, batch_size=size, progress=listener)
    else:
        dense = load_model(reference, dtype=dtype, device=place).model
        if _vocabulary(dense) != _vocabulary(loaded.model):
            raise MspError(f"{reference} has another vocabulary than {model}: their predictions do not compare")
        quality = DenseReference(dense, windows, batch_size=size, progress=listener).measure(
            loaded.model, progress=listener
        )
    figures: dict[str, Any] = {"model": str(model), "perplexity": quality.perplexity}
    if reference is not None:
        figures |= {"kl": quality.kl, "reference": str(reference)}
    return figures | {"evaluate": evaluate, "window": length, "tokens": windows.numel()}


def _options(sparsity: float | None, options: dict[str, Any]) -> PruneOptions:
    try:
        settings = PruneOptions(sparsity, **options)
    except TypeError as error:
        raise UsageError(str(error).replace("PruneOptions.__init__() ", "")) from error
    settings.check()
    return settings


def _device(name: str) -> torch.device:
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UsageError(f"device {name!r} is not known to torch") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no GPU")
    check_environment(device.type)
    return device


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _window(model: Any, window: int | None) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return min(2048, int(context)) if context else 2048
    if context and window > context:
        raise UsageError(f"a window of {window} tokens is longer than the model's context of {context}")
    return window


def _tensor_bytes(model: Any, stored: torch.dtype) -> int:
    """Bytes of all weights and buffers that a checkpoint holds, floats counted in the stored dtype."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.state_dict().values()}
    size = torch.empty(0, dtype=stored).element_size()
    return sum(t.numel() * (size if t.is_floating_point() else t.element_size()) for t in tensors.values())


@contextmanager
def _in_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Parameters in ``dtype`` for the length of the context; buffers (position tables) are left alone."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    try:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data = parameter.data.to(before[name])


def _both(dense: Quality, pruned: Quality) -> dict[str, float]:
    return {"dense": dense.perplexity, "pruned": pruned.perplexity}


def _recipe(options: PruneOptions, opened: _Opened, tokens: TokenSets, plan: Plan, found: Allocated) -> dict[str, Any]:
    names = ("allocator", "pruner", "unit", "fitness", "seed")
    versions = {"msp": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    return {
        "model": opened.loaded.source,
        **_budget_settings(options),
        **{name: getattr(options, name) for name in names},
        "calibration": dict(tokens.sources),
        "budget": plan.limit,
        "skipped": dict(plan.skipped),
        "search": {"candidates": found.evaluations, "forwarded": found.tokens, **asdict(found.options)}
        if found.options
        else None,
        "versions": versions,
    }


def _budget_settings(options: PruneOptions) -> dict[str, Any]:
    """What was asked of the levels, without what was not."""
    names = ["sparsity", "budget_bytes", "patterns" if options.patterns is not None else "group_size", "keep"]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
