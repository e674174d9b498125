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
        help="Instead of --sparsity: the most bytes of the whole packed model, like 300MB or 1.5GB.",
        rich_help_panel=METHOD,
    ),
]
BudgetDecode = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Instead of --sparsity: the most time that all prunable layers together take to decode a token, like "
        "12ms or 800us. Each layer is called once, and measured times predict the total.",
        rich_help_panel=METHOD,
    ),
]
DecodeTable = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The times for --budget-decode, from **msp measure**. Without it, msp measures them here first.",
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
        help="Patterns that a layer may have, instead of every N of one M. A layer can get a pattern if M divides its "
        "input size.",
        rich_help_panel=METHOD,
    ),
]
Compliant = Annotated[
    bool,
    typer.Option(
        "--compliant",
        help="Use only patterns that 2:4 sparse tensor cores can run. They keep at most 2 of every M weights.",
        rich_help_panel=METHOD,
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX=N:M,REGEX=dense",
        help="Pin the layers whose names match to a pattern or to dense, like 'layers.0.*=4:8'.",
        rich_help_panel=METHOD,
    ),
]
Allocator = Annotated[
    str,
    typer.Option(
        help="Decides how many weights each layer keeps: **msp** searches; uniform, ramp, owl, fisher-rank and "
        "fisher-knapsack are quicker and simpler; evopress, msp-paper, msp-random and ramp-best are for comparisons.",
        rich_help_panel=METHOD,
    ),
]
Pruner = Annotated[
    str,
    typer.Option(
        help="Decides which weights are kept: magnitude, **wanda**, ria, fisher or sparsegpt.",
        rich_help_panel=METHOD,
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        help="The part of the model that gets its own N: each **linear**, or each **block** as a whole.",
        rich_help_panel=METHOD,
    ),
]
Fitness = Annotated[
    str,
    typer.Option(
        metavar="kl|perplexity|MODULE:FUNCTION",
        help="The measure that the search minimises: **kl** (divergence from the dense model), **perplexity**, or your "
        "own function of logits and tokens, which returns the summed loss.",
        rich_help_panel=METHOD,
    ),
]
FitnessNoise = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the fitness tokens that random tokens replace, so that the result also suits other text (0.15; "
        "for kl only).",
        rich_help_panel=METHOD,
    ),
]
Candidates = Annotated[
    str,
    typer.Option(
        help="The weights that the search measures. **ranks**: dense weights that the pruner ranks first. "
        "**database**: layers pruned to every level, on disk. **auto**: the database for pruners that update weights.",
        rich_help_panel=METHOD,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help=f"Text for the statistics and the search: {SOURCE_HELP}. Without it: C4 from the hub.",
        rich_help_panel=DATA,
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help="Text for the final figures; the search never uses it. Without it: tokens held out of the calibration.",
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
    int | None, typer.Option(metavar="TOKENS", help="Tokens for the statistics.", rich_help_panel=COST)
]
FitnessTokens = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", help="Tokens that the search measures candidates on.", rich_help_panel=COST),
]
TestTokens = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Tokens for the final figures.", rich_help_panel=COST)
]
Evaluations = Annotated[
    int | None,
    typer.Option(
        metavar="COUNT",
        help="Candidates that the search may breed, in whole generations: more is slower and better. The first "
        "candidates and the measured sensitivities do not count.",
        rich_help_panel=COST,
    ),
]
SearchTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Tokens that the search may forward, over all candidates. Two searches with the same number can be "
        "compared. Without --evaluations, only this limit ends the search.",
        rich_help_panel=COST,
    ),
]
SearchOptions = Annotated[
    str | None,
    typer.Option(
        metavar="NAME: VALUE,...",
        help="Constants that replace those of the search, like 'generations: 20, sensitivities: 0', or the recipe.yaml "
        "of another search, to use its constants. docs/search-reference.md lists them.",
        rich_help_panel=COST,
    ),
]
# The limit in msp.text.token_sets.check_seed.
LARGEST_SEED = (1 << 63) - 1
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=LARGEST_SEED, help="Seed of the drawn calibration text and of the search.", rich_help_panel=RUN
    ),
]
Dtype = Annotated[
    str, typer.Option(help="The dtype to compute in: auto, float32, bfloat16 or float16.", rich_help_panel=RUN)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=RUN)]
Dequantise = Annotated[
    bool,
    typer.Option(
        "--dequantise",
        help="Convert the weights of a quantised model, like fp8, to floats. Without it msp refuses such a model.",
        rich_help_panel=RUN,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model. Read it first: it runs with all your rights.",
        rich_help_panel=RUN,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Run candidates in N processes. Each process holds the model, and uses one GPU, or one thread on a CPU. "
        "Needs Ray. Without this option the search runs in this process.",
        rich_help_panel=RUN,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Run candidates on this Ray cluster (or auto), in N processes, or in one on every GPU or CPU core.",
        rich_help_panel=RUN,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the search of an earlier, interrupted run. msp refuses a search with other weights, text or "
        "options, and the message names the differences.",
        rich_help_panel=RUN,
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for the checkpoints of the search. Without it: a folder next to OUT.",
        rich_help_panel=RUN,
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
        help="File for the picture. Without it: a file in this folder.",
        rich_help_panel=RUN,
    ),
]


class Budgets:
    """The options of the budget."""

    sparsity: Sparsity = None
    budget_bytes: BudgetBytes = None
    budget_decode: BudgetDecode = None
    decode_table: DecodeTable = None


class Levels:
    """The options of the patterns that a layer may have."""

    group_size: GroupSize = 8
    patterns: Patterns = None
    compliant: Compliant = False
    keep: Keep = None


class Methods:
    allocator: Allocator = "msp"
    pruner: Pruner = "wanda"


class Searching:
    """The options of the search and of its text."""

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
    """The options of a single search."""

    seed: Seed = 0
    resume: Resume = False
    work_dir: WorkDir = None


class Streaming:
    """The options for a model that does not fit in memory."""

    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Hold one block in memory at a time, for a model that does not fit.", rich_help_panel=RUN
        ),
    ] = False
    hidden_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Memory for hidden states, like 4GB; the default is a share of the free memory. With --stream, it "
            "holds the states that wait for the next block, and more memory means fewer reads of the blocks. "
            "Otherwise, it holds the states that candidates with the same first layers share.",
            rich_help_panel=RUN,
        ),
    ] = None


def takes(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds the options of ``groups`` to a verb, which gets them as ``**options``."""

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
