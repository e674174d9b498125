"""A model that is streamed from its files answers bit for bit what the same model in memory does."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, build, nm_units, save, tokens
from torch import nn

import msp
from msp.compressions.nm import NMCompression
from msp.compressions.nm_ranks import Ranks, StoredRanks
from msp.engine.candidates import CandidateModel, LocalRunner
from msp.engine.fitness import Job
from msp.engine.streaming import StreamingRunner
from msp.errors import MspError, UsageError
from msp.evidence.evaluate import DenseReference
from msp.evidence.fisher import fisher_traces
from msp.evidence.streamed import streamed_fisher_traces, streamed_logits
from msp.models.gates import GatedModel, State
from msp.models.hidden import HiddenStates
from msp.models.loading import load_model
from msp.models.stored import StoredBlock, load_stored
from msp.models.structure import Structure, find_structure
from msp.ops import nm_rank
from msp.plan.budget import Unit
from msp.text.token_sets import save_tokens

CPU = torch.device("cpu")
# Sliding windows, tied embeddings, Conv1D, a subclass of nn.Linear.
FAMILIES = ("gemma2", "llama-tied", "gpt2", "falcon")


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return sharded(request.param, tmp_path)


def sharded(family: str, path: Path) -> Path:
    """A model of ``family`` in several files."""
    model = save(family, path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def windows(count: int, length: int = 8) -> torch.Tensor:
    return tokens(count, length, seed=random.randrange(2**31))


class Counted:
    """``structure`` whose blocks count how often they come to a device, and say which are there."""

    def __init__(self, structure: Structure) -> None:
        self.loads: Counter[int] = Counter()
        self.present: set[int] = set()
        counted = self

        class Block(StoredBlock):
            @contextmanager
            def on(self, device: torch.device) -> Any:
                counted.loads[self.index] += 1
                counted.present.add(self.index)
                assert counted.present == {self.index}, "one block at a time"
                with super().on(device):
                    yield
                counted.present.clear()

        fields = [field.name for field in dataclasses.fields(StoredBlock)]
        blocks = [Block(**{name: getattr(block, name) for name in fields}) for block in structure.blocks]
        self.structure = dataclasses.replace(structure, blocks=tuple(blocks))


def units_of(model: nn.Module) -> list[Unit]:
    return nm_units(find_structure(model).linears)


def random_jobs(units: list[Unit], batches: int, count: int = 12) -> list[Job]:
    """Candidates of which many begin alike, on batches of their own."""
    stems = [[random.randint(0, unit.top) for unit in units] for _ in range(2)]
    jobs = []
    for _ in range(count):
        cut = random.randrange(len(units) + 1)
        levels = [*random.choice(stems)[:cut], *(random.randint(0, unit.top) for unit in units[cut:])]
        chosen = random.sample(range(batches), random.randint(1, batches))
        jobs.append(Job(tuple(levels), tuple(chosen)))
    return [*jobs, jobs[0], Job(jobs[0].levels, ())]


@pytest.mark.parametrize("large", [False, True], ids=["small vocabulary", "large vocabulary"])
def test_candidates_measure_what_they_do_in_memory(
    large: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("msp.evidence.head.LARGE_VOCABULARY", 1)
    model = load_model(folder).model
    structure, units, text = find_structure(model), units_of(model), windows(7)
    ranks: dict[str, Ranks] = {linear.name: {8: nm_rank(linear.weight.contiguous(), 8)} for linear in structure.linears}
    stored_ranks = StoredRanks(tmp_path)
    stored_ranks.update(ranks)
    reference = DenseReference(model, text, batch_size=2)
    jobs = random_jobs(units, reference.batches)
    with CandidateModel(model, structure, NMCompression(structure, ranks), units) as candidates:
        expected = LocalRunner(candidates, reference, structure).run(jobs)

    loaded, stored = load_stored(folder, device=CPU)
    counted = Counted(stored)
    streamed_reference = DenseReference(
        loaded.model, text, batch_size=2, logits=streamed_logits(loaded.model, stored, text, batch_size=2)
    )
    assert streamed_reference.quality == reference.quality
    gates = GatedModel(loaded.model, counted.structure)
    size = 2 * 8 * model.config.hidden_size * 4
    runner = StreamingRunner(
        gates, NMCompression(stored, stored_ranks), units, streamed_reference, hidden_bytes=5 * size + 1
    )
    assert runner.run(jobs) == expected
    items = len({(job.levels, batch) for job in jobs for batch in job.batches})
    groups = -(-items // 5)
    assert counted.loads == {block.index: groups for block in stored.blocks} and groups > 1
    assert runner.loads == groups * len(stored.blocks)
    assert 0 < runner.peak_bytes <= 5 * size
    assert all(parameter.is_meta for block in stored.blocks for parameter in block.module.parameters())
    # A job depends on nothing but the job, and one on nothing at all loads nothing.
    assert runner.run(jobs[3:4]) == expected[3:4]
    before = runner.loads
    assert runner.run([jobs[-1]]) == expected[-1:] and runner.loads == before


def test_what_candidates_share_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, stored = load_stored(sharded("qwen2", tmp_path), device=CPU)
    whole = load_model(tmp_path).model
    units, text = units_of(whole), windows(1)
    (tmp_path / "ranks").mkdir()
    ranks = StoredRanks(tmp_path / "ranks")
    for linear in find_structure(whole).linears:
        ranks[linear.name] = {8: nm_rank(linear.weight, 8)}
    first = sum(unit.block == 0 for unit in units)
    stems = [(*(random.randint(0, 7) for _ in range(first)), 8) for _ in range(2)]
    jobs = [Job((*stem, *(3 for _ in units[first + 1 : -1]), last), (0,)) for stem in stems for last in range(4)]
    ran: Counter[int] = Counter()
    run_block = GatedModel.block

    def counting(self: GatedModel, index: int, *args: Any) -> torch.Tensor:
        ran[index] += 1
        return run_block(self, index, *args)

    gates = GatedModel(loaded.model, stored)
    runner = StreamingRunner(
        gates, NMCompression(stored, ranks), units, DenseReference(whole, text), hidden_bytes=2**30
    )
    monkeypatch.setattr(GatedModel, "block", counting)
    runner.run(jobs)
    assert (ran[0], ran[1]) == (len(set(stems)), 4 * len(set(stems)))


def test_traces_are_those_of_the_whole_model(folder: Path) -> None:
    model, text = load_model(folder).model, windows(5)
    expected = fisher_traces(model, find_structure(model).linears, text)
    loaded, stored = load_stored(folder, device=CPU)
    counted = Counted(stored)
    state = 8 * model.config.hidden_size * 4
    held = 2 * state * (len(stored.blocks) + 2)
    found = streamed_fisher_traces(loaded.model, counted.structure, text, hidden_bytes=held)
    assert found == expected and min(found.values()) > 0
    assert counted.loads == {block.index: 2 * 3 for block in stored.blocks}, "twice for each group of two sequences"
    # With room for nothing the states go through files, one sequence at a time.
    assert streamed_fisher_traces(loaded.model, stored, text, hidden_bytes=0) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_spill_beyond_their_limit(dtype: torch.dtype) -> None:
    """Hidden states, and keys and values that blocks share."""

    def tensor() -> torch.Tensor:
        return torch.randn(3, 5).to(dtype)

    states = {key: State(tensor(), {("shared", "full"): (tensor(), tensor())}) for key in range(4)}
    size = 3 * tensor().nbytes
    hidden = HiddenStates(2 * size)
    for key, state in states.items():
        hidden.put(key, state)
    assert (hidden.held, hidden.spilled) == (2 * size, 2 * size)
    for read, key in ((hidden.get, 1), (hidden.get, 2), (hidden.pop, 0), (hidden.pop, 3)):
        found, state = read(key), states[key]
        assert found.left.keys() == state.left.keys() and isinstance(found.left["shared", "full"], tuple)
        assert all(torch.equal(one, other) for one, other in zip(found.tensors, state.tensors, strict=True))
    assert (hidden.held, hidden.spilled) == (size, size)


def test_half_precision_is_loaded_as_it_would_be_whole(tmp_path: Path) -> None:
    save("llama", tmp_path, dtype=torch.bfloat16)
    for dtype in ("auto", "bfloat16", "float16"):
        model = load_model(tmp_path, dtype=dtype, narrow=True).model
        loaded, stored = load_stored(tmp_path, dtype=dtype, device=CPU)
        assert loaded.stored_dtype == torch.bfloat16 and loaded.model.dtype == model.dtype
        for block in stored.blocks:
            with block.on(CPU):
                held = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
                assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in held.items())


def test_a_checkpoint_that_is_converted_on_loading_is_refused(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "mixtral")
    with pytest.raises(MspError, match=r"experts.* not stored under its own name: load this model whole"):
        load_stored(tmp_path / "mixtral", device=CPU)
    save("llama", tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 96'))
    with pytest.raises(MspError, match=r"down_proj.weight is stored in the shape \[32, 64\]"):
        load_stored(tmp_path / "llama", device=CPU)
    with pytest.raises(UsageError, match="float8"):
        load_stored(tmp_path / "llama", dtype="float8", device=CPU)


SMALL = {"window": 16, "calibration_tokens": 64, "fitness_tokens": 64, "test_tokens": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_tokens(torch.randint(0, VOCABULARY, (4096,)), path)
    return str(path)


@pytest.mark.parametrize("allocator", ["msp", "owl"])
def test_a_streamed_search_finds_what_one_in_memory_does(allocator: str, tmp_path: Path, text: str) -> None:
    model, work = sharded("qwen2", tmp_path / "model"), tmp_path / "work"
    options = {**SMALL, "sparsity": 0.7, "allocator": allocator, "calibration": text, "evaluations": 32}
    expected = msp.search(model, **options)
    found = msp.search(model, **options, stream=True, hidden_bytes="20kB", work_dir=work)
    assert (found.allocation, found.bytes) == (expected.allocation, expected.bytes)
    assert (found.history, found.sensitivities) == (expected.history, expected.sensitivities)
    assert not (work / "ranks").exists()


def test_what_does_not_go_with_streaming_is_said_at_once(tmp_path: Path) -> None:
    refusals = {
        "float32 per weight": ({"pruner": "fisher"}, {"allocator": "fisher-knapsack"}),
        "much": ({"hidden_bytes": "much"},),
        "workers": ({"workers": 2}, {"ray_address": "auto"}),
        "candidates ranks": ({"candidates": "database"}, {"pruner": "sparsegpt"}),
    }
    for message, requests in refusals.items():
        for wrong in requests:
            with pytest.raises(UsageError, match=message):
                msp.search(tmp_path / "absent", sparsity=0.5, stream=True, **wrong)
    with pytest.raises(UsageError, match="in memory"):
        msp.search(build("llama"), sparsity=0.5, stream=True)
    for whole in (
        lambda absent: msp.compare(absent, sparsity=0.5, allocators=["uniform"], stream=True),
        lambda absent: msp.sensitivity(absent, stream=True),
    ):
        with pytest.raises(UsageError, match=r"unknown option 'stream'"):
            whole(tmp_path / "absent")
