"""An estimate of the host memory that a run takes, made before the run; and the memory that is free.

    msp prune ./my-model -o out --sparsity 0.75 --calibration notes.txt --dry-run

The estimate adds the bytes that the process has already, the weights in memory, and the bytes of the largest stage.
docs/memory.md compares it with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msp.base.host_memory import available, resident
from msp.compressions.nm_weights import COPIED_BYTES
from msp.engine.candidates import HIDDEN_BYTES
from msp.evidence.head import LARGE_VOCABULARY, PIECE_BYTES
from msp.formats.patterns import NMPattern
from msp.formats.storage import Storage
from msp.models.loading import find_device
from msp.models.narrow import WIDENED_BYTES
from msp.models.structure import Linear, Structure
from msp.plan.plans import Plan, patterns_of
from msp.session.options import Options
from msp.session.workbench import ACTIVATION_BYTES, FITNESS_BATCH_TOKENS, backward_bytes, batch_size
from msp.text.text_sources import TokenSource
from msp.text.token_sets import POOL_FACTOR

# Bytes that libraries allocate when the first products run, and gaps between tensors in the heap.
FIRST_PRODUCTS = 40 << 20
# Bytes per token while a tokenizer works on one long text: ids, offsets, strings.
TOKENISED_BYTES = 500
# The fp32 values per token that a forward without gradients holds: this many times the hidden size, and this many times
# the width of the widest layer.
WIDTHS = 6, 4
# The logits of a batch and the values computed from them, in multiples of the fp32 logits.
LOGITS = 3.5
# The least limit on the hidden states that candidates share: it replaces half of the weights of a small model.
LEAST_HIDDEN_BYTES = 256 << 20
# Allocators that measure no Fisher traces, and allocators that do not search.
WITHOUT_TRACES = ("uniform", "ramp", "ramp-best", "owl", "evopress", "msp-random")
WITHOUT_SEARCH = ("uniform", "ramp", "owl", "fisher-rank", "fisher-rank-linear", "fisher-knapsack")
# Bytes per entry of a Hessian: the Hessian and its factor in float64, and their copies in float32.
FACTORS = 40


@dataclass(frozen=True)
class Footprint:
    """An estimate of host memory, in bytes.

    Attributes:
        base: bytes of the process before it loads the weights.
        weights: bytes of the dense model in memory.
        stages: bytes that each stage adds to ``base`` and ``weights``.
    """

    base: int
    weights: int
    stages: Mapping[str, int]

    @property
    def stage(self) -> str:
        """The name of the stage that takes most memory."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> int:
        return self.base + self.weights + self.stages[self.stage]

    def to_json(self) -> dict[str, Any]:
        return {"peak": self.peak, "stage": self.stage, "base": self.base, "weights": self.weights, **self.stages}


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a model that decide its memory; the methods return bytes."""

    structure: Structure
    window: int
    hidden: int
    vocabulary: int

    def forward(self, tokens: int) -> int:
        """Bytes of a forward of ``tokens`` without gradients, up to the output head."""
        widest = max(max(linear.shape) for linear in self.structure.linears)
        return 4 * tokens * (WIDTHS[0] * self.hidden + WIDTHS[1] * widest) + 2 * WIDENED_BYTES

    def kept(self, tokens: int) -> int:
        """Bytes of the kept predictions of the dense model on ``tokens``."""
        if self.vocabulary >= LARGE_VOCABULARY:
            return 4 * tokens * self.hidden
        probabilities = 4 * tokens * self.vocabulary
        return probabilities if probabilities <= 2 << 30 else probabilities // 2

    def measured(self, tokens: int) -> int:
        """Bytes that a measurement of a model takes, on batches of ``tokens``."""
        if self.vocabulary >= LARGE_VOCABULARY:
            return self.forward(tokens) + 4 * PIECE_BYTES["cpu"]
        return self.forward(tokens) + self.logits(tokens)

    def compared(self, tokens: int) -> int:
        """Bytes that a measurement of a candidate takes; the logits of its ``tokens`` are made at once."""
        if self.vocabulary >= LARGE_VOCABULARY:
            return self.measured(tokens) + int(1.2 * 4 * tokens * self.vocabulary)
        return self.measured(tokens)

    def logits(self, tokens: int) -> int:
        """Bytes of the logits of ``tokens`` and of the values computed from them."""
        return int(LOGITS * 4 * tokens * self.vocabulary)


def predict(model: Any, structure: Structure, plan: Plan, options: Options, *, window: int, packed: int) -> Footprint:
    """The memory that ``prune`` with ``options`` takes on a CPU.

    Args:
        model, structure: the model and its blocks; the weights may be on the meta device.
        plan: the units to prune.
        options: the options of the run.
        window: tokens per sequence.
        packed: bytes of the packed model.
    """
    embeddings = model.get_input_embeddings()
    hidden = getattr(model.config.get_text_config(), "hidden_size", embeddings.embedding_dim)
    sizes = _Sizes(structure, window, hidden, embeddings.num_embeddings)
    weights, dense = held_bytes(model), 0
    if options.stream:
        blocks = [held_bytes(block.module) for block in structure.blocks]
        weights, packed = weights - sum(blocks), packed * max(blocks) // max(1, sum(blocks))
        dense = max(blocks)
    linears = [linear for linear in structure.linears if any(linear.name in unit.linears for unit in plan.units)]
    needs = options.pruner.needs
    test, calibration = options.test_tokens, options.calibration_tokens
    batch = batch_size(torch.device("cpu"), window) * window
    reference = sizes.kept(test)
    states = 4 * sizes.hidden * (calibration + (test if options.stream else 0))
    stages = {
        "reading the texts": sum(_tokenising(options)),
        "predicting the test tokens": dense + reference + sizes.measured(min(batch, test)),
        "pruning": dense + packed + reference + states + _statistics(needs, structure, linears) + sizes.forward(batch),
        "measuring the pruned model": packed + reference + sizes.measured(min(batch, test)),
    }
    if not options.given and options.allocator.name not in WITHOUT_TRACES:
        stages["measuring sensitivities"] = dense + reference + _backward(sizes, calibration, options.stream)
    if not options.given and options.allocator.name not in WITHOUT_SEARCH:
        stages["searching"] = dense + reference + _searching(sizes, plan, linears, options, model)
    return Footprint(resident() + FIRST_PRODUCTS, weights, stages)


def held_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of ``module``, each counted once.

    Tied weights count once too, although they are not yet tied on the meta device.
    """
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    named = [*module.named_parameters(), *module.named_buffers()]
    tensors = {id(tensor): tensor for name, tensor in named if name not in tied}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tokenising(options: Options) -> list[int]:
    """Bytes for each text while it is tokenised."""
    drawn = POOL_FACTOR * (options.calibration_tokens + options.fitness_tokens) + options.test_tokens
    texts = {options.calibration: drawn}
    if options.evaluate is not None:
        texts[options.evaluate] = options.test_tokens
    found = []
    for spec, tokens in texts.items():
        source = TokenSource.parse(spec)
        file = Path(source.location)
        if source.kind == "file" and file.is_file():
            tokens = min(tokens, file.stat().st_size // 4)
            found.append(tokens * TOKENISED_BYTES)
        else:
            found.append(8 * tokens)
    return found


def _statistics(needs: frozenset[str], structure: Structure, linears: Sequence[Linear]) -> int:
    """Bytes of the statistics that a pruner needs for one block; Fisher diagonals are held for all blocks."""
    found = 0
    if "hessian" in needs:
        columns = [linear.shape[1] for linear in structure.blocks[0].linears]
        found += 4 * sum(size**2 for size in columns) + FACTORS * max(columns) ** 2
    if "fisher" in needs:
        found += 4 * sum(linear.weight.numel() for linear in linears)
    return found


def _backward(sizes: _Sizes, calibration: int, stream: bool) -> int:
    whole = backward_bytes(sizes.structure.linears, sizes.window)
    largest = max(linear.weight.numel() for linear in sizes.structure.linears)
    if whole <= ACTIVATION_BYTES and not stream:
        return whole + 4 * largest
    block = max(backward_bytes(block.linears, sizes.window) for block in sizes.structure.blocks)
    states = 4 * sizes.hidden * (len(sizes.structure.blocks) + 2)
    held = max(states * sizes.window, min(ACTIVATION_BYTES, states * calibration))
    return held + block + 4 * largest + sizes.logits(sizes.window)


def _searching(sizes: _Sizes, plan: Plan, linears: Sequence[Linear], options: Options, model: Any) -> int:
    fitness = options.fitness_tokens
    tokens = min(fitness, max(FITNESS_BATCH_TOKENS, sizes.window))
    units = {name: unit for unit in plan.units for name in unit.linears}
    found = sizes.kept(fitness) + sizes.compared(tokens)
    found += min(hidden_bytes(options, held_bytes(model)), 4 * fitness * sizes.hidden * len(sizes.structure.blocks))
    copies = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
    if options.stream:
        return found
    if options.database:
        return found + copies + sum(_levels_bytes(linear, patterns_of(units[linear.name])) for linear in linears)
    ranks = sum(
        linear.weight.numel() * len({pattern.m for pattern in patterns_of(units[linear.name])}) for linear in linears
    )
    return found + ranks + min(COPIED_BYTES, copies)


def _levels_bytes(linear: Linear, patterns: Sequence[NMPattern]) -> int:
    """Bytes of the pages of a level database that a search reads, for one linear."""
    storages = [Storage(pattern) for pattern in patterns if not pattern.is_dense]
    return sum(storage.nbytes(*linear.shape, linear.weight.dtype) for storage in storages)


def hidden_bytes(options: Options, weights: int) -> int:
    """The most bytes of hidden states: the option if it is given, or else a limit that suits the device.

    On a CPU it depends on the free memory and, without ``stream``, on the bytes of the ``weights``.
    """
    if options.hidden_bytes is not None:
        return options.hidden_bytes
    if find_device(options.device).type != "cpu":
        return HIDDEN_BYTES
    room = available()
    share = room // 4 if options.stream else max(LEAST_HIDDEN_BYTES, weights // 2)
    return min(HIDDEN_BYTES, share, room // 2)
