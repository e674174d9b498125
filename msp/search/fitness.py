"""What a search minimises, apart from where candidates are run: token counts, stages, and what was measured before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from msp.evaluate import Sums

if TYPE_CHECKING:  # the allocators import the search
    from msp.levels import Levels

Key = tuple[int, ...]
"""The level of every unit."""


FIRST_SHARE = 1 / 32
"""Of the fitness tokens: what the first stage of a race measures on, unless a user chooses other shares."""


@dataclass(frozen=True)
class Job:
    """A candidate and the batches of fitness tokens, by their numbers, to measure it on."""

    levels: Key
    batches: tuple[int, ...]


class Runner(Protocol):
    """Runs candidates: in this process, in others, or with a model that is not in memory as a whole."""

    @property
    def batches(self) -> int:
        """How many batches of fitness tokens there are."""
        ...

    def run(self, jobs: Sequence[Job]) -> list[Sums]:
        """Loss and divergence of every job, in the order of the jobs.

        A job's result depends on nothing but the job: not on the others, nor on what ran before.
        """
        ...


def stage_batches(share: float, batches: int) -> int:
    """How many of so many batches a stage measures on that is meant to have ``share`` of the tokens."""
    return max(1, round(share * batches))


def windows_per_batch(windows: int, least: int, most: int) -> int:
    """How many of ``windows`` go into a batch, so that whole batches come to ``FIRST_SHARE`` of them.

    Args:
        least, most: windows of a batch. A share of fewer than ``least`` windows is taken for ``least``.

    The first stage then differs from its share by half a window or a tenth of it at most.
    """
    target = max(float(least), FIRST_SHARE * windows)

    def error(size: int) -> float:
        return abs(size * stage_batches(FIRST_SHARE, -(-windows // size)) - target)

    sizes: list[int] = [min(most, max(least, int(FIRST_SHARE * windows))), *range(most, min(least, most) - 1, -1)]
    for size in sizes:
        if error(size) <= max(0.5, 0.1 * target):
            return size
    return min(sizes, key=error)


class TokenFitness:
    """Fitness of level vectors on fitness tokens, raced over growing parts of them.

    Args:
        runner: measures candidates.
        measure: ``"kl"`` (mean KL(dense || pruned), nats a token); for any other the mean loss that the runner
            sums: of ``"perplexity"`` its logarithm, so that differences compare across scales, or a task's own.
        shares: part of the batches that each stage measures on, ascending, the last one 1. Stages that come
            to the same number of batches are one.
    """

    def __init__(self, runner: Runner, *, measure: str = "kl", shares: Sequence[float] = (1 / 16, 1 / 4, 1.0)) -> None:
        self._stops = sorted({stage_batches(share, runner.batches) for share in shares})
        self._runner = runner
        self._measure = measure
        # What a candidate has been measured on so far: a later stage pays for the rest only.
        self._partial: dict[tuple[int, Key], tuple[int, Sums]] = {}
        self.tokens = 0

    @property
    def stages(self) -> int:
        return len(self._stops)

    def __call__(self, candidates: Sequence[Levels | Key], stage: int, draw: int = 0) -> list[float]:
        keys = [key_of(levels) for levels in candidates]
        order, stop = self._order(draw), self._stops[stage]
        before = [self._partial.pop((draw, key), (0, Sums())) for key in keys]
        jobs = [Job(key, tuple(order[done:stop])) for key, (done, _) in zip(keys, before, strict=True)]
        losses = []
        for key, (_, sums), new in zip(keys, before, self._runner.run(jobs), strict=True):
            self.tokens += new.tokens
            sums += new
            if stop < self._stops[-1]:
                self._partial[draw, key] = (stop, sums)
            loss = (sums.divergence if self._measure == "kl" else sums.loss) / sums.predicted
            losses.append(loss if loss == loss else float("inf"))
        return losses

    def _order(self, draw: int) -> list[int]:
        batches = self._runner.batches
        return np.random.default_rng(draw).permutation(batches).tolist() if draw else list(range(batches))


def key_of(levels: Levels | Key) -> Key:
    return tuple(int(level) for level in levels)
