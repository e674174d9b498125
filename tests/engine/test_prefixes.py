"""Candidates that begin alike share hidden states in memory, and measure what they do alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import build, nm_units, tokens
from torch import nn

from msp import ops
from msp.compressions.nm import NMCompression
from msp.engine.candidates import CandidateModel, LocalRunner, precision
from msp.engine.fitness import Job
from msp.evidence.evaluate import DenseReference, Sums
from msp.models.gates import GatedModel
from msp.models.structure import Structure, find_structure

LENGTH = 8


class Bed:
    """A random model, its candidates and what measures them."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = build(family, random.randrange(2**31), dtype)
        self.structure = find_structure(self.model)
        linears = [linear for linear in self.structure.linears if linear.shape[1] % 8 == 0]
        ranks = {linear.name: {8: ops.nm_rank(linear.weight.contiguous(), 8)} for linear in linears}
        self.compression = NMCompression(self.structure, ranks)
        self.units = nm_units(linears)
        self.reference = DenseReference(self.model, tokens(8, LENGTH, seed=random.randrange(2**31)), batch_size=2)
        self.state = 2 * LENGTH * self.model.get_input_embeddings().embedding_dim * dtype.itemsize

    def jobs(self, count: int = 12) -> list[Job]:
        """Of which many begin alike, and one comes twice, on batches of their own."""
        stems = [[random.randint(0, unit.top) for unit in self.units] for _ in range(2)]
        jobs = []
        for _ in range(count):
            cut = random.randrange(len(self.units) + 1)
            levels = [*random.choice(stems)[:cut], *(random.randint(0, unit.top) for unit in self.units[cut:])]
            jobs.append(Job(tuple(levels), tuple(random.sample(range(4), random.randint(1, 4)))))
        return [*jobs, jobs[0], Job(jobs[0].levels, ())]

    @contextmanager
    def runner(self, hidden_bytes: int = 2**30) -> Iterator[LocalRunner]:
        with CandidateModel(self.model, self.structure, self.compression, self.units) as candidates:
            yield LocalRunner(candidates, self.reference, self.structure, hidden_bytes=hidden_bytes)

    def alone(self, jobs: Sequence[Job]) -> list[Sums]:
        """Each job by whole forwards of the model."""
        sums = []
        with CandidateModel(self.model, self.structure, self.compression, self.units) as candidates:
            for job in jobs:
                candidates.apply(job.levels)
                with precision(self.model):
                    sums.append(self.reference.sums(self.model, job.batches))
        return sums


@contextmanager
def counted(structure: Structure) -> Iterator[Counter[int]]:
    """How often each block runs."""
    runs: Counter[int] = Counter()

    def hook(block: int) -> Any:
        return lambda *_: runs.update([block])

    handles = [block.module.register_forward_hook(hook(block.index)) for block in structure.blocks]
    yield runs
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gemma2", torch.float32),
        ("gpt2", torch.float32),
        ("falcon", torch.float32),
        ("opt", torch.float32),
        ("mixtral", torch.float32),
        ("llama-tied", torch.bfloat16),
    ],
)
def test_what_is_shared_changes_no_bit(
    family: str, dtype: torch.dtype, bf16_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16_products)
    bed = Bed(family, dtype)
    jobs = bed.jobs()
    expected = bed.alone(jobs)
    for room in (2**30, 3 * bed.state, 0):
        with bed.runner(room) as runner:
            assert runner.run(jobs) == expected
            assert runner.run(jobs[3:4]) == expected[3:4] and runner.run([]) == []


def test_each_block_runs_once_for_all_that_begin_alike() -> None:
    bed = Bed("qwen2")
    # on the same batches, as in a stage of a race
    jobs = [Job(job.levels, (2, 0)) for job in bed.jobs(30)]
    items = {(batch, job.levels) for job in jobs for batch in job.batches}
    reached = [sum(unit.block <= block.index for unit in bed.units) for block in bed.structure.blocks]
    needed = [len({(batch, levels[:stop]) for batch, levels in items}) for stop in reached]
    alone = sum(len(job.batches) for job in jobs)
    with bed.runner() as runner, counted(bed.structure) as runs:
        runner.run(jobs)
        checked = Counter({0: 5, 1: 6})  # once: in three whole forwards, twice alone, and from the middle
        assert runs - checked == Counter(dict(enumerate(needed))) and needed[0] < alone
        runs.clear()
        runner.run(jobs)
        assert runs == Counter(dict(enumerate(needed)))
    with bed.runner(bed.state - 1) as runner, counted(bed.structure) as runs:
        runner.run(jobs)
        assert runs - checked == Counter({0: alone, 1: alone})


def test_no_more_is_held_than_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed("llama")
    jobs, peaks, run = bed.jobs(20), [0], LocalRunner._run

    def watched(self: LocalRunner, job: Job, states: dict[Any, torch.Tensor], wanted: Any) -> Sums:
        found = run(self, job, states, wanted)
        peaks.append(sum(state.nbytes for state in states.values()))
        return found

    monkeypatch.setattr(LocalRunner, "_run", watched)
    for room in (2, 1, 0):
        with bed.runner(room * bed.state) as runner:
            runner.run(jobs)
        assert max(peaks) == room * bed.state
        peaks[:] = [0]


def test_blocks_that_know_more_than_hidden_states_share_nothing() -> None:
    bed = Bed("llama")
    first, second = (block.module for block in bed.structure.blocks)
    seen: list[torch.Tensor] = []

    def remember(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen[:] = [output]

    def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + seen[0].mean()

    first.register_forward_hook(remember)
    second.register_forward_hook(add)
    jobs = bed.jobs()
    expected = bed.alone(jobs)
    with bed.runner() as runner:
        assert runner.run(jobs) == expected


def test_a_model_is_itself_again_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed("llama")
    before = dict(bed.model.named_modules())
    fails = iter([False, False, False, True])
    resume = GatedModel.resume

    def failing(self: GatedModel, *args: Any) -> torch.Tensor:
        if next(fails):
            raise FloatingPointError
        return resume(self, *args)

    monkeypatch.setattr(GatedModel, "resume", failing)
    with pytest.raises(FloatingPointError), bed.runner() as runner:
        runner.run(bed.jobs())
    assert dict(bed.model.named_modules()) == before
