"""The verbs of the command line. They import heavy libraries when they run, so that ``msp --help`` is fast."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from msp import __version__
from msp.cli.options import AsJson, Debug, Model, Picture, given, takes
from msp.cli.running import calm_libraries, running
from msp.errors import MspError, UsageError
from msp.session.arguments import (
    CompareArguments,
    EvaluateArguments,
    GenerateArguments,
    InfoArguments,
    PruneArguments,
    SensitivityArguments,
)
from msp.session.declarations import METHOD, RUN

app = typer.Typer(
    name="msp",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a language model smaller and faster by N:M pruning, with a different N for every layer.\n\n"
    "**N:M keeps N of every M consecutive weights** of a row: 2:8 keeps a quarter. msp finds the layers "
    "that need their weights most, gives them a larger N and the others a smaller one, and meets the sparsity that you "
    "ask for exactly.\n\n"
    'Start with **msp prune MODEL -o OUT --sparsity 0.75**, then **msp generate OUT "Once upon a time"**.',
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"msp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


BUDGETS = {"sparsity", "budget_bytes", "budget_decode", "allocation"}


def with_budget(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were set, with a sparsity of 0.75 if no budget was set."""
    found = given(options)
    return found if found.keys() & BUDGETS else {"sparsity": 0.75, **found}


@app.command()
@takes(PruneArguments)
def prune(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Directory to write the packed model to.", rich_help_panel=RUN
        ),
    ],
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the model at OUT, if msp wrote all its files.", rich_help_panel=RUN),
    ] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw OUT/pictures/*.png.", rich_help_panel=RUN)
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only print the plan of the run and the memory that it needs. msp reads the headers of the files and "
            "nothing else, and writes nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Prune a model to N:M sparsity and save it packed.

    N:M keeps N of every M consecutive weights of a row, so --sparsity 0.75 with groups of 8 keeps 2:8 on average. The
    search gives every layer its own N; the sum meets the sparsity exactly. The result loads with plain transformers
    after `import msp`.

    Example: msp prune ./my-model -o ./my-model-75 --sparsity 0.75 --calibration notes.txt
    """
    interrupted = f"interrupted, {output} is not written; run the same command with --resume to go on"
    with running(as_json, debug, on_interrupt=interrupted) as session:
        import msp
        from msp.base.outputs import check_output, reserved, working_folder
        from msp.show.report import preview_report, prune_report

        calm_libraries()
        work_dir = options["work_dir"] or search_folder(output)
        chosen = with_budget({**options, "work_dir": work_dir})
        # the folders stay reserved until the run ends: another run may then begin
        if dry_run:
            check_output(output, force, model=model, work_dir=work_dir)
            planned = msp.dry_run(model, progress=session.progress, **chosen)
            session.result(planned.to_json(), preview_report(planned))
            return
        with reserved(output, force, model=model, work_dir=work_dir), working_folder(work_dir):
            result = msp.prune(model, output=output, force=force, progress=session.progress, **chosen)
            if options["work_dir"] is None:
                shutil.rmtree(work_dir, ignore_errors=True)
            drawn: list[Path] = []
            if pictures:
                from msp.show.pictures import prune_pictures

                with session.progress.stage("Drawing pictures"):
                    drawn = _draw(lambda: prune_pictures(result, output / "pictures"))
        session.result(result.to_json(), Group(prune_report(result, output), *_files("Pictures", drawn)))


def search_folder(output: Path) -> Path:
    """The hidden folder next to ``output`` for the checkpoints of the search."""
    return output.absolute().with_name(f".{output.absolute().name}.search")


def _draw(draw: Callable[[], list[Path]]) -> list[Path]:
    """The pictures that ``draw`` writes; if it fails, a warning, so that no result is lost."""
    try:
        return draw()
    except (OSError, MspError) as error:
        warnings.warn(f"no pictures: {error}", stacklevel=2)
        return []


def _files(label: str, paths: list[Path]) -> list[Text]:
    return [Text(f"{label}: {', '.join(map(str, paths))}", style="dim")] if paths else []


@app.command()
@takes(CompareArguments)
def compare(
    model: Model,
    allocators: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Allocators to compare.", rich_help_panel=METHOD)
    ] = "uniform,ramp,owl,fisher-rank,fisher-knapsack,msp",
    pruners: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Pruners to compare them with.", rich_help_panel=METHOD)
    ] = "wanda",
    seeds: Annotated[
        int,
        typer.Option(
            min=1, max=1000, metavar="COUNT", help="Repeat with this many seeds: 0, 1, 2 ...", rich_help_panel=RUN
        ),
    ] = 3,
    every_seed: Annotated[
        bool,
        typer.Option("--every-seed", help="Show a row for each seed, and not only the means.", rich_help_panel=RUN),
    ] = False,
    output: Picture = None,
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compare ways to spend the same budget of weights, in one table.

    Every row prunes the same model to the same sparsity and is measured on the same test tokens, which take no part in
    the search. KL is the distance of the predictions from those of the dense model; lower is better.

    Example: msp compare ./my-model --sparsity 0.75 --allocators uniform,msp --pruners wanda,sparsegpt --seeds 3
    """
    with running(as_json, debug) as session:
        import msp

        picture = _picture_path(output, model, "compare")
        from msp.show.pictures import compare_picture
        from msp.show.report import compare_report

        calm_libraries()
        result = msp.compare(
            model,
            allocators=_names("allocators", allocators),
            pruners=_names("pruners", pruners),
            seeds=list(range(seeds)),
            progress=session.progress,
            **with_budget(options),
        )
        drawn = _draw(lambda: [compare_picture(result, picture)])
        report = compare_report(result, every_seed=every_seed)
        session.result(result.to_json(), Group(report, *_files("Picture", drawn)))


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--{option} names none")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(f"--{option} names {', '.join(repeated)} more than once")
    return names


def _picture_path(output: Path | None, model: str, verb: str) -> Path:
    path = output if output is not None else Path(f"{Path(model).name or 'model'}-{verb}.png")
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is not a .png file")
    if not path.absolute().parent.is_dir():
        raise MspError(f"{path}: there is no folder {path.absolute().parent}")
    from msp.show.pictures import check_picture

    check_picture(path)
    return path


@app.command()
@takes(SensitivityArguments)
def sensitivity(
    model: Model, output: Picture = None, as_json: AsJson = False, debug: Debug = False, **options: Any
) -> None:
    """Show the layers in which a model can least afford to lose weights.

    The figure is the trace of the Fisher information matrix of each linear: the sum over its weights of the squared
    gradient of the loss, averaged over sequences. If it is large, small changes of the weights matter.

    Example: msp sensitivity ./my-model --calibration notes.txt
    """
    with running(as_json, debug) as session:
        import msp

        picture = _picture_path(output, model, "sensitivity")
        from msp.show.pictures import sensitivity_picture
        from msp.show.report import sensitivity_report

        calm_libraries()
        result = msp.sensitivity(model, progress=session.progress, **given(options))
        drawn = _draw(lambda: [sensitivity_picture(result.traces, picture)])
        session.result(result.to_json(), Group(sensitivity_report(result), *_files("Picture", drawn)))


@app.command()
@takes(EvaluateArguments)
def evaluate(model: Model, as_json: AsJson = False, debug: Debug = False, **options: Any) -> None:
    """Measure the perplexity of a model, dense or packed.

    Perplexity is taken over non-overlapping windows of tokens. It depends on the text, the window, the tokenizer and
    the dtype: figures taken with other settings cannot be compared. The model and its reference compute in the same
    dtype. With --dtype auto that is float32 on a CPU, for packed models too, and elsewhere the dtype in which the
    reference (without one, the model) is stored.

    Example: msp evaluate ./my-model-75 --evaluate test.txt --reference ./my-model
    """
    with running(as_json, debug) as session:
        import msp
        from msp.show.report import figures_report

        calm_libraries()
        figures = msp.evaluate(model, progress=session.progress, **given(options)).to_json()
        session.result(figures, figures_report(figures))


@app.command()
@takes(GenerateArguments)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Let a model, dense or packed, continue a text.

    Example: msp generate ./my-model-75 "Once upon a time" --max-new-tokens 100
    """
    with running(as_json, debug) as session:
        import msp

        calm_libraries()
        with session.progress.stage("Generating", options["max_new_tokens"]) as advance:
            completion = msp.generate(model, prompt, on_token=advance, **given(options))
        session.result(completion.to_json(), Text.assemble((prompt, "dim"), completion.text))
        session.say(f"{completion.tokens} tokens, {completion.tokens_per_second:.1f} tokens/s")


@app.command()
@takes(InfoArguments)
def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A packed model, or a dense one: a directory or a hub id.")
    ],
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Describe a model without loading its weights.

    For a packed model, it prints the bytes, the pattern of every layer (N:M keeps N of M) and the settings of the run.
    For a dense model, it prints the layers that can be pruned, and the group sizes M that divide them.

    Example: msp info ./my-model-75
    """
    with running(as_json, debug) as session:
        import msp
        from msp.show.report import info_report

        calm_libraries()
        found, verified = msp.info(model, **given(options)), options["verify"]
        session.result({**found.to_json(), **({"verified": True} if verified else {})}, info_report(found, verified))
