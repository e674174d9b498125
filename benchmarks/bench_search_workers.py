"""Candidates on two workers, compared with one: each on 2,048 tokens, on wiki6m, one thread a worker.

Needs the model in ``../shared`` (or ``$MSP_SHARED``) and Ray.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runner import ROOT, measure

from msp import ops
from msp.base.progress import NoProgress
from msp.compressions.nm import NMCompression
from msp.engine.distributed import Workers, ray_runner
from msp.engine.fitness import Job
from msp.engine.runners import Setting
from msp.evidence.evaluate import DenseReference
from msp.models.loading import load_model
from msp.models.structure import find_structure
from msp.plan.plans import Goal, PatternRules, make_plan

MODEL = Path(os.environ.get("MSP_SHARED", ROOT.parent / "shared")) / "models" / "wiki6m"
GROUP, CANDIDATES, WINDOW, WINDOWS = 8, 8, 256, 8


def setting() -> Setting:
    """Rank codes by magnitude, and random tokens: the measured time depends on neither."""
    model = load_model(MODEL).model
    structure = find_structure(model)
    linears = structure.linears
    ranks = {linear.name: {GROUP: ops.nm_rank(linear.weight.contiguous(), GROUP)} for linear in linears}
    units = make_plan(structure, Goal(Fraction(1, 2)), PatternRules.parse(GROUP)).units
    windows = torch.randint(3, model.config.vocab_size, (WINDOWS, WINDOW))
    return Setting(
        model, structure, NMCompression(structure, ranks), units, DenseReference(model, windows, batch_size=WINDOWS)
    )


def test_two_workers(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    if not MODEL.exists():
        pytest.skip(f"needs {MODEL}")
    # the default of a worker
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        shared = setting()
        rng = np.random.default_rng(0)
        jobs = [Job(tuple(rng.integers(1, 4, len(shared.units)).tolist()), (0,)) for _ in range(CANDIDATES)]
        with (
            ray_runner(shared, Workers(1), NoProgress()) as one,
            ray_runner(shared, Workers(2), NoProgress()) as two,
        ):
            alone, together = one.run(jobs), two.run(jobs)
            error = max(abs(a.divergence - b.divergence) for a, b in zip(alone, together, strict=True))
            measure(
                benchmark, lambda: two.run(jobs), {"one worker": lambda: one.run(jobs)}, error=error, bound=0, seconds=4
            )
    finally:
        ray.shutdown()
    benchmark.extra_info["candidates_per_second"] = CANDIDATES / benchmark.extra_info["median_seconds"]
