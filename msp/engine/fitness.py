"""The fitness that a search minimises: its stages, its token counts and the partial sums of earlier stages.

A ``Runner`` decides in which process the candidates run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from msp.evidence.evaluate import Sums

if TYPE_CHECKING:  # the allocators import the search
    from msp.plan.levels import Levels

Key = tuple[int, ...]
"""The level of every unit."""


FIRST_SHARE = 1 / 32
"""Share of the fitness tokens that the first stage of a race measures on, by default."""


@dataclass(frozen=True)
class Job:
    """A candidate, and the numbers of the batches of fitness tokens that it is measured on."""

    levels: Key
    batches: tuple[int, ...]


class Runner(Protocol):
    """Runs candidates: in this process, in other processes, or block by block with a streamed model."""

    @property
    def batches(self) -> int:
        """The number of batches of fitness tokens."""
        ...

    def run(self, jobs: Sequence[Job]) -> list[Sums]:
        """The summed loss and divergence of every job, in the order of the jobs.

        The result of a job depends on the job alone, not on other jobs or earlier runs.
        """
        ...


def stage_batches(share: float, batches: int) -> int:
    """The number of batches, out of ``batches``, that a stage with ``share`` of the tokens measures on; at least 1."""
    return max(1, round(share * batches))


def windows_per_batch(windows: int, least: int, most: int) -> int:
    """The number of windows in a batch, chosen so that whole batches make up ``FIRST_SHARE`` of ``windows``.

    Args:
        windows: the number of windows in all.
        least, most: limits of the windows in a batch. If the share is below ``least`` windows, ``least`` replaces it.

    If a size within the limits allows it, the first stage differs from its share by at most half a window or a tenth.
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
        measure: ``"kl"`` for the mean KL(dense || pruned) in nats a token. Any other name selects the mean loss that
            the runner sums: the logarithm of the perplexity for ``"perplexity"``, or the loss of a task.
        shares: part of the batches that each stage measures on, rising; the last part is 1. Stages with the same
            number of batches become one stage.
    """

    def __init__(self, runner: Runner, *, measure: str = "kl", shares: Sequence[float] = (1 / 16, 1 / 4, 1.0)) -> None:
        self._stops = sorted({stage_batches(share, runner.batches) for share in shares})
        self._runner = runner
        self._measure = measure
        # The batches that a candidate was measured on, and their sums: a later stage measures only the other batches.
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
