"""The options of every verb, declared once: name, type, default, help, and what the command line calls them.

The groups are ``TypedDict`` classes, so that type checkers and editors know the keyword arguments of the functions. The
command line makes its options from the same groups, and ``Options.parse`` takes its defaults from them. This module
imports nothing heavy, because ``msp --help`` needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msp.session.declarations import COST, DATA, RUN, Option

if TYPE_CHECKING:
    from msp.allocators import Allocator
    from msp.evidence.task_loss import TaskLoss
    from msp.pruners import Pruner
else:  # the command line evaluates the types, and imports neither torch nor numpy for that
    Allocator = TaskLoss = Pruner = object

SOURCE_HELP = (
    "a text file; records.jsonl:FIELD (also .json, .ndjson, .csv, .tsv, .parquet, .arrow), where FIELD is text when "
    "left out, FIELD.SUB if nested, or a chat such as messages; a folder of such files, FOLDER:FIELD; "
    "tokens.safetensors (saved token ids); or a hub data set, hub:DATASET[:CONFIG]:SPLIT:COLUMN, or hub-joined:... to "
    "join its rows into one text"
)


# These stand in several groups.
WINDOW = Option(
    "Tokens per sequence. Without it: the model's context, at most 2048.", kind=int, heading=DATA, metavar="TOKENS"
)
TRUST = Option(
    "Run the Python code that comes with the model. Read it first: it runs with all your rights.",
    False,
    bool,
    heading=RUN,
)


class Budgets(TypedDict, total=False):
    """How much may stay; one of them."""

    sparsity: Annotated[
        float | str | Fraction | None,
        Option(
            "Share of the weights to remove, between 0 and 1: 0.75 keeps one in four.",
            metavar="SHARE",
            letter="s",
            aside="It is 0.75 if no budget is given. **msp search** takes several, like 0.5,0.6,0.75.",
        ),
    ]
    budget_bytes: Annotated[
        int | str | None,
        Option(
            "Instead of --sparsity: the most bytes of the whole packed model, like 300MB or 1.5GB.",
            metavar="BYTES",
            aside="**msp search** takes several.",
        ),
    ]
    budget_decode: Annotated[
        str | None,
        Option(
            "Instead of --sparsity: the most time that all prunable layers together take to decode a token, like 12ms "
            "or 800us. Each layer is called once, and measured times predict the total.",
            metavar="TIME",
            aside="**msp search** takes several.",
        ),
    ]
    decode_table: Annotated[
        str | Path | None,
        Option(
            "The times for --budget-decode, from **msp measure**. Without it, msp measures them here first.",
            kind=Path,
            metavar="FILE",
        ),
    ]


class Patterns(TypedDict, total=False):
    """The patterns that a layer may have."""

    group_size: Annotated[int, Option("M of N:M, one of 4, 8, 16, 32.", 8, int, metavar="M", letter="m")]
    patterns: Annotated[
        str | None,
        Option(
            "Patterns that a layer may have, instead of every N of one M. A layer can get a pattern if M divides its "
            "input size.",
            metavar="N:M,N:M",
        ),
    ]
    compliant: Annotated[
        bool,
        Option(
            "Use only patterns that 2:4 sparse tensor cores can run. They keep at most 2 of every M weights.",
            False,
            bool,
        ),
    ]
    keep: Annotated[
        str | None,
        Option(
            "Pin the layers whose names match to a pattern or to dense, like 'layers.0.*=4:8'.",
            metavar="REGEX=N:M,REGEX=dense",
        ),
    ]


class Given(TypedDict, total=False):
    """An allocation that was found before."""

    allocation: Annotated[
        str | Path | None,
        Option(
            "Instead of --sparsity and a search: allocation.json or recipe.yaml of **msp search**, or a recipe of your "
            "own.",
            kind=Path,
            metavar="FILE",
        ),
    ]


class Methods(TypedDict, total=False):
    """The allocator and the pruner; the functions take objects too."""

    allocator: Annotated[
        str | Allocator,
        Option(
            "Decides how many weights each layer keeps: **msp** searches; uniform, ramp, owl, fisher-rank and "
            "fisher-knapsack are quicker and simpler; evopress, msp-paper, msp-random and ramp-best are for "
            "comparisons.",
            "msp",
        ),
    ]
    pruner: Annotated[
        str | Pruner,
        Option("Decides which weights are kept: magnitude, **wanda**, ria, fisher or sparsegpt.", "wanda"),
    ]


class Searching(TypedDict, total=False):
    """What a search measures, and how long it may take."""

    unit: Annotated[
        str,
        Option("The part of the model that gets its own N: each **linear**, or each **block** as a whole.", "linear"),
    ]
    fitness: Annotated[
        str | TaskLoss,
        Option(
            "The measure that the search minimises: **kl** (divergence from the dense model), **perplexity**, or your "
            "own function of logits and tokens, which returns the summed loss.",
            "kl",
            metavar="kl|perplexity|MODULE:FUNCTION",
        ),
    ]
    fitness_noise: Annotated[
        float,
        Option(
            "Share of the fitness tokens that random tokens replace, so that the result also suits other text; for kl "
            "only.",
            0.15,
            float,
            metavar="SHARE",
        ),
    ]
    candidates: Annotated[
        str,
        Option(
            "The weights that the search measures. **ranks**: dense weights that the pruner ranks first. "
            "**database**: layers pruned to every level, on disk. **auto**: the database for pruners that update "
            "weights.",
            "auto",
        ),
    ]
    evaluations: Annotated[
        int | None,
        Option(
            "Candidates that the search may breed, in whole generations: more is slower and better. The first "
            "candidates and the measured sensitivities do not count.",
            kind=int,
            heading=COST,
            metavar="COUNT",
        ),
    ]
    search_tokens: Annotated[
        int | None,
        Option(
            "Tokens that the search may forward, over all candidates. Two searches with the same number can be "
            "compared. Without --evaluations, only this limit ends the search.",
            kind=int,
            heading=COST,
            metavar="TOKENS",
        ),
    ]
    search_options: Annotated[
        str | Path | Mapping[str, Any] | None,
        Option(
            "Constants that replace those of the search, like 'generations: 20, patience: 0', or the recipe.yaml of "
            "another search, to use its constants. docs/search-reference.md lists them.",
            heading=COST,
            metavar="NAME: VALUE,...",
        ),
    ]
    workers: Annotated[
        int | None,
        Option(
            "Run candidates in N processes. Each process holds the model, and uses one GPU, or one thread on a CPU. "
            "Needs Ray. Without this option the search runs in this process.",
            kind=int,
            heading=RUN,
            metavar="N",
        ),
    ]
    ray_address: Annotated[
        str | None,
        Option(
            "Run candidates on this Ray cluster (or auto), in N processes, or in one on every GPU or CPU core.",
            heading=RUN,
            metavar="HOST:PORT",
        ),
    ]


class Calibrating(TypedDict, total=False):
    """The text of the statistics."""

    calibration: Annotated[
        str | None,
        Option(
            f"Text for the statistics and the search: {SOURCE_HELP}. Without it: C4 from the hub.",
            heading=DATA,
            metavar="SRC",
        ),
    ]
    window: Annotated[int | None, WINDOW]
    calibration_tokens: Annotated[
        int, Option("Tokens for the statistics.", 65_536, int, heading=COST, metavar="TOKENS")
    ]


class Measuring(TypedDict, total=False):
    """The text of the search and of the final figures."""

    evaluate: Annotated[
        str | None,
        Option(
            "Text for the final figures; the search never uses it. Without it: tokens held out of the calibration.",
            heading=DATA,
            metavar="SRC",
        ),
    ]
    fitness_tokens: Annotated[
        int, Option("Tokens that the search measures candidates on.", 32_768, int, heading=COST, metavar="TOKENS")
    ]
    test_tokens: Annotated[int, Option("Tokens for the final figures.", 32_768, int, heading=COST, metavar="TOKENS")]


class Placing(TypedDict, total=False):
    """Where a model runs, and what of it is trusted."""

    device: Annotated[str, Option("auto, cpu, cuda or cuda:1.", "auto", heading=RUN)]
    dequantise: Annotated[
        bool,
        Option(
            "Convert the weights of a quantised model, like fp8, to floats. Without it msp refuses such a model.",
            False,
            bool,
            heading=RUN,
        ),
    ]
    trust_remote_code: Annotated[bool, TRUST]


class Loading(Placing, total=False):
    """How a model is loaded."""

    dtype: Annotated[str, Option("The dtype to compute in: auto, float32, bfloat16 or float16.", "auto", heading=RUN)]


class Seeded(TypedDict, total=False):
    """The draw of the text."""

    seed: Annotated[int, Option("Seed of the drawn calibration text and of the search.", 0, int, heading=RUN)]


class Resuming(TypedDict, total=False):
    """The checkpoints of a single search."""

    resume: Annotated[
        bool,
        Option(
            "Continue the search of an earlier, interrupted run. msp refuses a search with other weights, text or "
            "options, and the message names the differences.",
            False,
            bool,
            heading=RUN,
        ),
    ]
    work_dir: Annotated[
        str | Path | None,
        Option(
            "Folder for the checkpoints of the search.",
            kind=Path,
            heading=RUN,
            metavar="DIR",
            aside="Without it: a folder next to OUT.",
        ),
    ]


class Remembering(TypedDict, total=False):
    """Memory for hidden states."""

    hidden_bytes: Annotated[
        int | str,
        Option(
            "Memory for hidden states, like 4GB; auto is a share of the free memory. With --stream, it holds the "
            "states that wait for the next block, and more memory means fewer reads of the blocks. Otherwise, it "
            "holds the states that candidates with the same first layers share.",
            "auto",
            heading=RUN,
            metavar="BYTES",
        ),
    ]


class Streaming(Remembering, total=False):
    """What serves a model that does not fit in memory."""

    stream: Annotated[
        bool,
        Option("Hold one block in memory at a time, for a model that does not fit.", False, bool, heading=RUN),
    ]


class SensitivityArguments(Calibrating, Seeded, Loading, total=False):
    """The options of ``sensitivity``."""


class CompareArguments(Budgets, Patterns, Searching, Calibrating, Measuring, Loading, Remembering, total=False):
    """The options of ``compare``."""


class SearchArguments(
    Budgets,
    Patterns,
    Methods,
    Searching,
    Calibrating,
    Measuring,
    Loading,
    Seeded,
    Resuming,
    Streaming,
    total=False,
):
    """The options of ``search``."""


class ParetoArguments(Patterns, Methods, Searching, Calibrating, Measuring, Loading, Seeded, Streaming, total=False):
    """The options of ``pareto``, which takes its budgets and its folder itself."""

    decode_table: Annotated[
        str | Path | None, Option("The times for ``budgets_decode``, from ``measure``.", kind=Path, metavar="FILE")
    ]
    resume: Annotated[bool, Option("Continue the searches of an earlier, interrupted run.", False, bool, heading=RUN)]


class PruneArguments(SearchArguments, Given, total=False):
    """The options of ``prune``."""


class MeasureArguments(Patterns, Loading, total=False):
    """The options of ``measure``."""


class EvaluateArguments(Loading, total=False):
    """The options of ``evaluate``."""

    evaluate: Annotated[
        str | None,
        Option(
            f"Text to measure on: {SOURCE_HELP}. Without it: the WikiText-2 test text from the hub.",
            heading=DATA,
            metavar="SRC",
        ),
    ]
    reference: Annotated[
        str | Path | None,
        Option("The dense model; the KL divergence from it is measured too.", metavar="MODEL"),
    ]
    window: Annotated[int | None, WINDOW]
    test_tokens: Annotated[
        int | None, Option("Tokens to measure on. Without it: all.", kind=int, heading=COST, metavar="TOKENS")
    ]


class GenerateArguments(Loading, total=False):
    """The options of ``generate``."""

    max_new_tokens: Annotated[int, Option("The most tokens to generate.", 64, int)]
    temperature: Annotated[
        float, Option("0 takes the likeliest token; 1 samples from the model's probabilities.", 0.0, float)
    ]
    seed: Annotated[int, Option("Seed of the sampling.", 0, int)]


class Trusting(TypedDict, total=False):
    """Code that comes with a model."""

    trust_remote_code: Annotated[bool, TRUST]


class InfoArguments(Trusting, total=False):
    """The options of ``info``."""

    verify: Annotated[
        bool,
        Option("Read all weights of a packed model and compare them with the hashes stored with it.", False, bool),
    ]
