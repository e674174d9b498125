"""The verb ``search``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from msp.cli.options import (
    RUN,
    Allocator,
    AsJson,
    BudgetBytes,
    Calibration,
    CalibrationTokens,
    Debug,
    Device,
    Dtype,
    Evaluate,
    Evaluations,
    Fitness,
    FitnessNoise,
    FitnessTokens,
    GroupSize,
    HiddenBytes,
    Keep,
    Model,
    Patterns,
    Pruner,
    Resume,
    SearchTokens,
    Seed,
    Sparsity,
    Stream,
    TestTokens,
    Unit,
    Window,
    WorkDir,
)
from msp.cli.running import calm_libraries, running
from msp.cli.verbs import app, check_sources, default_sparsity, given, search_folder


@app.command()
def search(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Directory to write allocation.json and recipe.yaml to; what is there of these is replaced.",
            rich_help_panel=RUN,
        ),
    ],
    sparsity: Sparsity = None,
    budget_bytes: BudgetBytes = None,
    group_size: GroupSize = 8,
    patterns: Patterns = None,
    keep: Keep = None,
    allocator: Allocator = "msp",
    pruner: Pruner = "wanda",
    unit: Unit = "linear",
    fitness: Fitness = "kl",
    fitness_noise: FitnessNoise = None,
    calibration: Calibration = None,
    evaluate: Evaluate = None,
    window: Window = None,
    calibration_tokens: CalibrationTokens = None,
    fitness_tokens: FitnessTokens = None,
    test_tokens: TestTokens = None,
    evaluations: Evaluations = None,
    search_tokens: SearchTokens = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    resume: Resume = False,
    work_dir: WorkDir = None,
    stream: Stream = False,
    hidden_bytes: HiddenBytes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find out how many weights each layer keeps, and prune nothing yet.

    Writes the pattern of every layer (N:M keeps N of every M consecutive weights) as JSON and as a recipe in YAML, to
    be read, changed and given to msp prune --allocation. Test tokens are set aside as there: with the same options,
    both together give the model that msp prune alone gives.

    Example: msp search ./my-model -o ./found --budget-bytes 300MB --calibration notes.txt
    """
    interrupted = f"interrupted, {output} is not written; run the same command with --resume to go on"
    with running(as_json, debug, on_interrupt=interrupted) as session:
        check_sources(calibration, evaluate)
        from msp import pipeline
        from msp.report import search_report

        calm_libraries()
        result = pipeline.search(
            model,
            sparsity=default_sparsity(sparsity, budget_bytes),
            output=output,
            progress=session.progress,
            group_size=group_size,
            allocator=allocator,
            pruner=pruner,
            unit=unit,
            fitness=fitness,
            seed=seed,
            dtype=dtype,
            device=device,
            resume=resume,
            stream=stream,
            work_dir=work_dir if work_dir is not None else search_folder(output),
            **given(
                budget_bytes=budget_bytes,
                patterns=patterns,
                keep=keep,
                calibration=calibration,
                evaluate=evaluate,
                window=window,
                calibration_tokens=calibration_tokens,
                fitness_noise=fitness_noise,
                fitness_tokens=fitness_tokens,
                test_tokens=test_tokens,
                evaluations=evaluations,
                search_tokens=search_tokens,
                hidden_bytes=hidden_bytes,
            ),
        )
        if work_dir is None:
            shutil.rmtree(search_folder(output), ignore_errors=True)
        session.result(result.to_json(), search_report(result, output))
