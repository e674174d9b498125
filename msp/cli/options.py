"""The options that several verbs share, with their help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

METHOD, DATA, COST, RUN = "Method", "Text", "Cost", "Output and running"
SOURCE_HELP = (
    "a text file; records.jsonl:FIELD (also .json, .ndjson, .csv, .tsv, .parquet, .arrow), where FIELD is text when "
    "left out, FIELD.SUB if nested, or a chat such as messages; a folder of such files, FOLDER:FIELD; "
    "tokens.safetensors (saved token ids); or a hub data set, hub:DATASET[:CONFIG]:SPLIT:COLUMN, or hub-joined:... to "
    "join its rows into one text"
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, a hub id, or a packed model.")]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        "-s",
        help="Share of the weights to remove, between 0 and 1: 0.75, the default, keeps one in four.",
        rich_help_panel=METHOD,
    ),
]
BudgetBytes = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Instead of --sparsity: what the whole packed model may take, like 300MB or 1.5GB.",
        rich_help_panel=METHOD,
    ),
]
BudgetDecode = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Instead of --sparsity: how long all prunable layers together may take to decode a token, like 12ms or "
        "800us, each called once, as predicted from measured times.",
        rich_help_panel=METHOD,
    ),
]
DecodeTable = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The times for --budget-decode, from **msp measure**. Without it they are measured first, here.",
        rich_help_panel=METHOD,
    ),
]
GroupSize = Annotated[
    int,
    typer.Option("--group-size", "-m", metavar="M", help="M of N:M, one of 4, 8, 16, 32.", rich_help_panel=METHOD),
]
Patterns = Annotated[
    str | None,
    typer.Option(
        metavar="N:M,N:M",
        help="Patterns a layer may have, N of every M kept, instead of all of one M. A layer is given those whose M "
        "divides its input size.",
        rich_help_panel=METHOD,
    ),
]
Compliant = Annotated[
    bool,
    typer.Option(
        "--compliant",
        help="Only patterns that 2:4 sparse tensor cores can run: those that keep at most 2 of every M.",
        rich_help_panel=METHOD,
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX=N:M,REGEX=dense",
        help="Pin layers whose names match, like 'layers.0.*=4:8': to a pattern, or to stay dense.",
        rich_help_panel=METHOD,
    ),
]
Allocator = Annotated[
    str,
    typer.Option(
        help="Decides how many weights each layer keeps: **msp** searches; uniform, ramp, owl, fisher-rank and "
        "fisher-knapsack are quicker and simpler. To compare with: evopress, msp-paper, msp-random, ramp-best.",
        rich_help_panel=METHOD,
    ),
]
Pruner = Annotated[
    str,
    typer.Option(
        help="Decides which weights stay: magnitude, **wanda**, ria, fisher or sparsegpt.",
        rich_help_panel=METHOD,
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        help="What gets an N of its own: every **linear**, or every **block** as a whole.",
        rich_help_panel=METHOD,
    ),
]
Fitness = Annotated[
    str,
    typer.Option(
        metavar="kl|perplexity|MODULE:FUNCTION",
        help="What the search minimises: **kl** (divergence from the dense model), **perplexity**, or your own "
        "function of logits and tokens, which returns their summed loss.",
        rich_help_panel=METHOD,
    ),
]
FitnessNoise = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the fitness tokens replaced by random ones, for what is found to hold on other text "
        "(0.15; for kl only).",
        rich_help_panel=METHOD,
    ),
]
Candidates = Annotated[
    str,
    typer.Option(
        help="What the search measures: **ranks**, layers cut down to what the pruner ranks first; **database**, "
        "layers pruned to every level, kept on disk; **auto**, the database for pruners that update weights.",
        rich_help_panel=METHOD,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help=f"Text to gather statistics and to search on: {SOURCE_HELP}. Without it: C4 from the hub.",
        rich_help_panel=DATA,
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help="Text for the final figures, never searched on. Without it: a part of the calibration text is held out.",
        rich_help_panel=DATA,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Tokens per sequence. Without it: the model's context, at most 2048.",
        rich_help_panel=DATA,
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Tokens to gather statistics on.", rich_help_panel=COST)
]
FitnessTokens = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Tokens the search measures candidates on.", rich_help_panel=COST)
]
TestTokens = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Tokens the final figures are of.", rich_help_panel=COST)
]
Evaluations = Annotated[
    int | None,
    typer.Option(
        metavar="COUNT",
        help="Candidates the search may breed, in whole generations: more is slower and better. Its first ones and "
        "measured sensitivities come on top.",
        rich_help_panel=COST,
    ),
]
SearchTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Tokens the search may forward, counted over all candidates: what two searches can be compared at. "
        "Without --evaluations it alone ends the search.",
        rich_help_panel=COST,
    ),
]
SearchOptions = Annotated[
    str | None,
    typer.Option(
        metavar="NAME: VALUE,...",
        help="Constants of the search in the place of its own, like 'generations: 20, sensitivities: 0', or a "
        "recipe.yaml, to search as that one did; docs/search-reference.md explains them.",
        rich_help_panel=COST,
    ),
]
# As msp.data.check_seed has it.
LARGEST_SEED = (1 << 63) - 1
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=LARGEST_SEED, help="Draws the calibration text and steers the search.", rich_help_panel=RUN
    ),
]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16: what to compute in.", rich_help_panel=RUN)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=RUN)]
Dequantise = Annotated[
    bool,
    typer.Option(
        "--dequantise",
        help="Compute the weights of a quantised model (fp8, say) back to floats. Such a model is refused without it.",
        rich_help_panel=RUN,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model. Read it first: it can do all that you can.",
        rich_help_panel=RUN,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Run candidates in N processes, each with the model: one thread each on a CPU, a GPU each where there "
        "are. Needs Ray; without it the search runs in this process.",
        rich_help_panel=RUN,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Run them on this Ray cluster (or auto): N of it, or one on every GPU or CPU core.",
        rich_help_panel=RUN,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the search that an earlier, interrupted run left. A search with other weights, text or "
        "options is refused, and the message names what differs.",
        rich_help_panel=RUN,
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where the search keeps its checkpoints. Without it: beside OUT.", rich_help_panel=RUN
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object on standard output and everything else on standard error.",
        rich_help_panel=RUN,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PNG",
        help="Where to put the picture. Without it: in this folder.",
        rich_help_panel=RUN,
    ),
]


class Budgets:
    """How much may stay."""

    sparsity: Sparsity = None
    budget_bytes: BudgetBytes = None
    budget_decode: BudgetDecode = None
    decode_table: DecodeTable = None


class Levels:
    """What a layer can be given."""

    group_size: GroupSize = 8
    patterns: Patterns = None
    compliant: Compliant = False
    keep: Keep = None


class Methods:
    allocator: Allocator = "msp"
    pruner: Pruner = "wanda"


class Searching:
    """How levels are found, and on which text."""

    unit: Unit = "linear"
    fitness: Fitness = "kl"
    fitness_noise: FitnessNoise = None
    candidates: Candidates = "auto"
    calibration: Calibration = None
    evaluate: Evaluate = None
    window: Window = None
    calibration_tokens: CalibrationTokens = None
    fitness_tokens: FitnessTokens = None
    test_tokens: TestTokens = None
    evaluations: Evaluations = None
    search_tokens: SearchTokens = None
    search_options: SearchOptions = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    dequantise: Dequantise = False
    trust_remote_code: TrustRemoteCode = False
    workers: Workers = None
    ray_address: RayAddress = None


class OneSearch:
    """What goes with a single search."""

    seed: Seed = 0
    resume: Resume = False
    work_dir: WorkDir = None


class Streaming:
    """For a model that does not fit in memory."""

    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="The model does not fit in memory: hold one block at a time.", rich_help_panel=RUN
        ),
    ] = False
    hidden_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Memory for hidden states, like 4GB; by default a share of what is free. With --stream, those that "
            "wait for the next block: more means that the blocks are read less often. Else those that candidates with "
            "the same first layers share.",
            rich_help_panel=RUN,
        ),
    ] = None


def takes(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb, ahead of its own optional parameters, the options of ``groups``; it gets them as ``**options``."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(verb, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(name, kind, default=getattr(group, name), annotation=annotation)
            for group in groups
            for name, annotation in inspect.get_annotations(group, eval_str=True).items()
        ]
        required = [parameter for parameter in own if parameter.default is parameter.empty]
        optional = [parameter.replace(kind=kind) for parameter in own if parameter not in required]
        parameters = [*required, *shared, *optional]

        @functools.wraps(verb)
        def run(**given: Any) -> None:
            verb(**given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
