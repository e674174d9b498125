"""The cost of a search of a large model, by arithmetic: tokens, bytes and seconds on one and on eight H200.

    python benchmarks/search_plan.py            # print the table
    python benchmarks/search_plan.py --write    # put it into docs/search-reference.md

No run on such a device supports these figures. The device's peaks are NVIDIA's data sheet. The shares of them that a
run reaches are assumptions, all of them in ``Device``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from runner import ROOT, write_table

from msp.allocators.evolution import EvolutionOptions
from msp.engine.evolution import MOVES

GB = 1e9
VALUE, RANK = 2, 1  # bytes of a weight in bf16, of its rank code
LINEARS = 7  # of a block
PARTS = ("measuring sensitivities", "racing", "setting levels", "loading blocks")


@dataclass(frozen=True)
class Shape:
    """A Llama; ``kv`` is the width of its keys."""

    name: str
    hidden: int
    ffn: int
    blocks: int
    kv: int
    vocabulary: int

    @property
    def linears(self) -> int:
        """Weights that are pruned: q, k, v, o, gate, up and down of every block."""
        return self.blocks * (2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.ffn)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    def flop(self, window: int) -> float:
        """FLOP of one token in a forward: two for each weight, and attention to half the window on average."""
        return 2 * (self.linears + self.head) + self.blocks * 4 * self.hidden * window / 2


SHAPES = (
    Shape("Llama-2-7B", 4096, 11008, 32, 4096, 32_000),
    Shape("Llama-3-70B", 8192, 28672, 80, 1024, 128_256),
    Shape("Llama-3.1-405B", 16384, 53248, 126, 1024, 128_256),
)


@dataclass(frozen=True)
class Device:
    """An H200. From the data sheet: bytes of memory, FLOP/s of dense bf16, bytes/s of HBM and of PCIe 5.0 x16.

    ``compute``, ``memory`` and ``link`` are the shares of the last three that a run is *assumed* to reach.
    """

    bytes: float = 141 * GB
    flops: float = 989e12
    hbm: float = 4800 * GB
    pcie: float = 64 * GB
    compute: float = 0.4
    memory: float = 0.8
    link: float = 0.8


@dataclass(frozen=True)
class Plan:
    """One search: its tokens, the data that must be in memory, and the seconds of a generation from sensitivities.

    Attributes:
        stages: the stages of a generation: candidates, and the tokens that each one forwards anew.
        streamed: whether the model does not fit: every stage then loads all blocks once, and all its candidates pass
            through each.
    """

    shape: Shape
    device: Device
    options: EvolutionOptions
    fitness_tokens: int
    window: int

    @property
    def stages(self) -> list[tuple[int, int]]:
        candidates, before, found = self.options.offspring, 0, []
        for stage, share in enumerate(self.options.token_shares):
            stop = round(share * self.fitness_tokens)
            found.append((candidates, stop - before))
            if stage < len(self.options.survivors):
                candidates, before = max(1, round(candidates * self.options.survivors[stage])), stop
        return found

    @property
    def probes(self) -> tuple[int, int]:
        """The runs that measure sensitivities: the best individual, and it with a linear a level up or down."""
        return 1 + min(MOVES, 2 * LINEARS * self.shape.blocks), self.stages[0][1]

    @property
    def passes(self) -> list[tuple[int, int]]:
        """Tokens of a generation from sensitivities: they are measured, then its children race."""
        return [self.probes, *self.stages]

    @property
    def resident(self) -> int:
        """Bytes of weights, ranks, the kept copy of a running candidate, embeddings and head."""
        return self.shape.linears * (VALUE + RANK + VALUE) + 2 * self.shape.head * VALUE

    @property
    def stored(self) -> int:
        """Bytes of weights and ranks."""
        return self.shape.linears * (VALUE + RANK)

    @property
    def block(self) -> int:
        """Bytes of one block with its ranks and kept copy."""
        return self.shape.linears * (VALUE + RANK + VALUE) // self.shape.blocks

    @property
    def streamed(self) -> bool:
        return self.resident > 0.9 * self.device.bytes

    @property
    def hidden_states(self) -> int:
        """Bytes of the hidden states of a pass, all of whose candidates are between the same two blocks."""
        return max(candidates * tokens for candidates, tokens in self.passes) * self.shape.hidden * VALUE

    @property
    def probabilities(self) -> int:
        """Bytes in host memory: the dense model's predictions on the fitness tokens, in fp16."""
        return self.fitness_tokens * self.shape.vocabulary * 2

    @property
    def loads(self) -> int:
        """Bytes that cross the link to each device in a generation."""
        return len(self.passes) * self.stored if self.streamed else 0

    def seconds(self, devices: int) -> tuple[float, float, float, float]:
        """Seconds of a generation: measuring sensitivities, the race's forwards, setting levels, and loading blocks.

        Blocks are loaded during the forwards. A candidate stays on one device, so a pass takes as long as the device
        with the most candidates.
        """
        rounds = [(ceil(candidates / devices), tokens) for candidates, tokens in self.passes]
        device = self.device
        sensitivities, *race = (most * tokens * self.shape.flop(self.window) for most, tokens in rounds)
        # nm_keep reads a weight and its rank and writes the weight again; a measured move changes one linear
        changed = sum(most for most, _ in rounds[1:]) + rounds[0][0] / (LINEARS * self.shape.blocks)
        kept = changed * self.shape.linears * (VALUE + RANK + VALUE)
        rate = device.flops * device.compute
        return (
            sensitivities / rate,
            sum(race) / rate,
            kept / (device.hbm * device.memory),
            self.loads / (device.pcie * device.link),
        )

    def generation(self, devices: int) -> float:
        *computing, loading = self.seconds(devices)
        return max(sum(computing), loading)


def table(plans: Sequence[Plan]) -> str:
    """A column for each model."""

    def gb(count: float) -> str:
        return f"{count / GB:,.1f} GB"

    lines: list[tuple[str, list[str]]] = [
        ("weights in linears", [f"{plan.shape.linears / 1e9:.2f} G" for plan in plans]),
        ("FLOP a token", [f"{plan.shape.flop(plan.window):.3g}" for plan in plans]),
        ("tokens forwarded to measure sensitivities", [f"{prod(plan.probes):,}" for plan in plans]),
        ("tokens forwarded to race 16 children", [f"{sum(map(prod, plan.stages)):,}" for plan in plans]),
        ("weights, ranks and kept copy", [gb(plan.resident) for plan in plans]),
        ("of that on the device", [f"a block, {gb(plan.block)}" if plan.streamed else "all" for plan in plans]),
        ("hidden states between blocks, host", [gb(plan.hidden_states) if plan.streamed else "" for plan in plans]),
        ("weights and ranks, host", [gb(plan.stored) if plan.streamed else "" for plan in plans]),
        ("dense predictions, host", [gb(plan.probabilities) for plan in plans]),
        ("loaded a generation, by each device", [gb(plan.loads) if plan.streamed else "" for plan in plans]),
    ]
    for devices in (1, 8):
        parts = zip(*(plan.seconds(devices) for plan in plans), strict=True)
        for name, values in zip(PARTS, parts, strict=True):
            lines.append((f"{devices} H200: {name}", [f"{value:.3g} s" for value in values]))
        lines.append((f"{devices} H200: a generation", [f"**{plan.generation(devices):.3g} s**" for plan in plans]))
        hours = [plan.generation(devices) * plan.options.generations / 3600 for plan in plans]
        lines.append((f"{devices} H200: {plans[0].options.generations} generations", [f"{h:.2g} h" for h in hours]))
    head = ["", *(plan.shape.name for plan in plans)]
    rows = [head, ["---"] * len(head), *([name, *values] for name, values in lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def default_plans() -> list[Plan]:
    return [Plan(shape, Device(), EvolutionOptions(), fitness_tokens=131_072, window=2048) for shape in SHAPES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/search-reference.md")
    made = table(default_plans())
    sys.stdout.write(made)
    if parser.parse_args().write:
        write_table(ROOT / "docs" / "search-reference.md", "plan", made)


if __name__ == "__main__":
    main()
