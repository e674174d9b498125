"""The options that several verbs share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

METHOD, DATA, COST, RUN = "Method", "Text", "Cost", "Output and running"
SOURCE_HELP = (
    "a text file, records.jsonl:FIELD, tokens.safetensors (saved token ids) or a hub data set "
    "hub:DATASET[:CONFIG]:SPLIT:COLUMN"
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
        help="What the search minimises: **kl** (divergence from the dense model) or **perplexity**.",
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
        metavar="COUNT", help="Candidates the search may measure: more is slower and better.", rich_help_panel=COST
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
Seed = Annotated[int, typer.Option(help="Draws the calibration text and steers the search.", rich_help_panel=RUN)]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16: what to compute in.", rich_help_panel=RUN)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=RUN)]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the search that an earlier, interrupted run left.", rich_help_panel=RUN),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where the search keeps its checkpoints. Without it: beside OUT.", rich_help_panel=RUN
    ),
]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="The model does not fit in memory: hold one block at a time.", rich_help_panel=RUN),
]
HiddenBytes = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="With --stream: memory for the hidden states that wait for the next block (4GB). More means that the "
        "blocks are read less often.",
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
        help="Where to put the picture. Without it: in this folder.",
        rich_help_panel=RUN,
    ),
]
