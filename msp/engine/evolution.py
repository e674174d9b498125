"""Evolutionary search over the levels of units, within an exact budget.

The search follows MSP (arXiv 2503.11164). An individual is a vector with one level per unit. The first individuals
come from the Fisher traces, and the fittest become parents. Mutation and single-point crossover (off by default) keep
the budget. The paper's constants are not public; the constants here are this project's.

The project adds three things to the published search. Candidates race: all are measured on a few tokens, the best on
all tokens, and no candidate is measured twice. The first population contains individuals with emptied blocks. A
generation is bred from the sensitivities of all units, which are measured around the best individual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from msp.base.identity import Identity, hashed_data
from msp.engine.fitness import FIRST_SHARE, Key, key_of
from msp.engine.operators import crossover, swap
from msp.engine.sensitivities import Sensitivities, averaged, least_known, single_moves
from msp.engine.state import FIRST, State, Step, load_state, save_state
from msp.errors import MspError, UsageError
from msp.plan.budget import Budget, Unit
from msp.plan.levels import Levels, levels_from_densities, repair

# A density so low that the common shift to the budget does not raise it above zero.
EMPTY = 1e6

# The most moves whose effects one generation measures. A model with more units than half this number has more moves,
# and they take turns.
MOVES = 256

# More generations than any search reaches: the limit on tokens ends the search first.
UNLIMITED = 1_000_000


class Fitness(Protocol):
    """Measures candidates; a lower value is better. ``stages`` is the number of stages of a race.

    A stage before the last one measures on a part of the tokens. ``draw`` picks that part; draw 0 is always the first
    tokens.
    """

    @property
    def stages(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Tokens forwarded so far."""
        ...

    def __call__(self, candidates: Sequence[Key], stage: int, draw: int = 0) -> list[float]: ...


@dataclass(frozen=True)
class EvolutionOptions:
    """Constants of the search (this project's: the paper's are not public).

    Attributes:
        generations: rounds of offspring after the first population.
        population: number of individuals kept from one generation to the next.
        parents: number of the fittest individuals from which random offspring descend.
        offspring: new candidates per generation.
        token_shares: share of the fitness tokens that each stage of a race measures on, rising; the last share is 1.
        survivors: share of the candidates that goes on to the next stage, for each stage but the last.
        crossover_rate: share of the random offspring that has two parents.
        emptied: number of the best seeds for which the first population also gets versions with emptied blocks.
        patience: a generation is bred from the measured effects of moving each unit of the best individual by
            one step (``Sensitivities``), until the same individual has been the best for this number of generations;
            random offspring follow. 0 turns this off. The effects are measured on tokens drawn for them alone.
        resample: if true, every generation races on newly drawn tokens; if false, always on the first tokens. The
            number of tokens is the same.
        tokens: no generation begins after the search has forwarded this many tokens; None sets no limit.

    Raises:
        UsageError: a constant is out of range, or the shares and the survivors do not fit together.
    """

    generations: int = 30
    population: int = 12
    parents: int = 6
    offspring: int = 16
    token_shares: tuple[float, ...] = (FIRST_SHARE, 1 / 8, 1.0)
    survivors: tuple[float, ...] = (0.3, 0.3)
    crossover_rate: float = 0.0
    emptied: int = 2
    patience: int = 3
    resample: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        if min(self.population, self.parents, self.offspring) < 1 or self.generations < 0:
            raise UsageError("population, parents and offspring must be at least 1, generations at least 0")
        shares = self.token_shares
        if not shares or shares[-1] != 1 or min(shares) <= 0 or list(shares) != sorted(shares):
            raise UsageError(f"token shares {shares} do not rise from above 0 to 1")
        if len(self.survivors) != len(shares) - 1 or not all(0 < share <= 1 for share in self.survivors):
            raise UsageError(f"survivors {self.survivors} are not {len(shares) - 1} shares in (0, 1]")
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"{self.tokens} tokens: a search needs at least one")

    def limited(self, *, evaluations: int | None = None, tokens: int | None = None) -> EvolutionOptions:
        """The same search with a limit of ``evaluations`` measured candidates or ``tokens`` forwarded tokens.

        None sets no limit. If only ``tokens`` is given, the number of generations does not end the search. A search
        without generations measures only its first individuals, so its options stay as they are.
        """
        if not self.generations:
            return self
        generations = self.generations
        if evaluations is not None:
            generations = max(0, round(evaluations / self.offspring))
        elif tokens is not None:
            generations = UNLIMITED
        return replace(self, generations=generations, tokens=tokens)


class Evolution:
    """The search. ``run`` returns the best levels found and the history of the generations.

    Args:
        units: the units of the model, in order of depth.
        budget: the budget that every individual meets.
        seeds: at least one level vector, from which the first population comes; a vector that misses the budget is
            repaired.
        fitness: measures the loss of a level vector at a stage; equal inputs must give equal results.
        options: the constants of the search.
        seed: the seed of every random choice.
        checkpoint: a JSON file that is written atomically after every generation.
        resume: continue from ``checkpoint`` if the file exists.
        identity: the inputs that ``fitness`` depends on. A checkpoint is continued only if its identity, units,
            budget, options and seeds are the same.
        on_step: called with the new ``Step`` after every generation.

    Raises:
        MspError: the checkpoint is unreadable or belongs to another search.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        budget: Budget,
        seeds: Sequence[Levels],
        fitness: Fitness,
        *,
        options: EvolutionOptions | None = None,
        seed: int = 0,
        checkpoint: Path | None = None,
        resume: bool = False,
        identity: Identity | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self._units = units
        self._budget = budget
        self._seeds = [repair(np.asarray(levels), units, budget) for levels in seeds]
        self._fitness = fitness
        self._options = options or EvolutionOptions()
        self._seed = seed
        self._checkpoint = checkpoint
        self._on_step = on_step
        self._identity = {**asked(units, budget, seed), **(identity or {}), **self._starting()}
        # With M = 16 or 32 the levels are fine, and a step is more than one level.
        self._step = max(1, max(unit.top for unit in units) // 8)
        self._tokens_before = 0
        self._state = State()
        if resume and checkpoint is not None and checkpoint.exists():
            self._state = load_state(checkpoint, self._identity, units, budget, fitness.stages)
            self._tokens_before = self._state.tokens

    def run(self) -> tuple[Levels, list[Step]]:
        if not self._state.population:
            self._begin()
        while self._state.generation < self._options.generations and not self._spent():
            # A generator per generation: a resumed search draws the same numbers as an uninterrupted one.
            rng = np.random.default_rng([self._seed, self._state.generation + 1])
            offspring = self._offspring(rng)
            if not offspring:
                break
            self._race(offspring, self._survivors(len(offspring)))
            self._end_generation()
        return np.array(self._state.population[0][1], dtype=np.int64), self._state.history

    def _spent(self) -> bool:
        return self._options.tokens is not None and self._state.tokens >= self._options.tokens

    def _begin(self) -> None:
        seeds = list(dict.fromkeys(key_of(levels) for levels in self._seeds))
        first = list(dict.fromkeys(seeds + self._without_blocks(seeds)))
        # Most candidates stay in this race, because the loss of a good one costs most at the start.
        self._race(first, [self._options.population] + [self._options.parents] * self._fitness.stages)
        self._end_generation(count=False)

    def _without_blocks(self, seeds: Sequence[Key]) -> list[Key]:
        """Versions of the best ``seeds`` in which a run of blocks is emptied and the other blocks are raised.

        A run has up to a quarter of the blocks. Single moves rarely find a block that the model can do without,
        because a half-empty block is worse than a full one and than an empty one.
        """
        bases = [key for _, key in self._ranked(seeds, 0)][: self._options.emptied]
        blocks = sorted({unit.block for unit in self._units})
        found = []
        for length in _run_lengths(len(blocks) // 4):
            for start in range(0, len(blocks) - length + 1, max(1, length // 4)):
                found += [self._without(key, blocks[start : start + length]) for key in bases]
        return list(dict.fromkeys(found))

    def _without(self, key: Key, blocks: Sequence[int]) -> Key:
        densities = [
            -EMPTY if unit.block in blocks or not level else unit.sizes[level]
            for unit, level in zip(self._units, key, strict=True)
        ]
        return key_of(levels_from_densities(densities, self._units, self._budget))

    def _offspring(self, rng: np.random.Generator) -> list[Key]:
        return self._from_sensitivities(rng) or self._breed(rng)

    def _from_sensitivities(self, rng: np.random.Generator) -> list[Key]:
        """Children of the best individual by the sensitivities; none if it is stale or the tokens do not suffice."""
        state = self._state
        best, base = state.population[0]
        if self._stale() >= self._options.patience or best == math.inf:
            return []
        moves = single_moves(base, self._units, self._step)
        moves = least_known(moves, state.effects, base, MOVES, rng)
        limit = self._options.tokens
        if limit is not None and state.tokens + len(moves) * state.first_stage > limit:
            return []
        # Other tokens each time: the average covers more text, and the race uses tokens that chose no candidate.
        own, *losses = self._fitness([base, *moves.values()], 0, state.generation + 1)
        if own == math.inf:
            return []
        state.effects.append((base, {move: loss - own for move, loss in zip(moves, losses, strict=True)}))
        effects = averaged(state.effects, base)
        found = Sensitivities(self._units, self._budget, base, effects, self._step)
        seen = {key for _, key in state.measured}
        return [key for key in found.children(self._options.offspring, rng) if key not in seen]

    def _stale(self) -> int:
        """The number of generations since the best individual was found."""
        best = [step.best for step in self._state.history]
        return len(best) - 1 - best.index(best[-1])

    def _breed(self, rng: np.random.Generator) -> list[Key]:
        options = self._options
        parents = [np.array(key) for _, key in self._state.population[: options.parents]]
        seen = {key for _, key in self._state.measured}
        found: list[Key] = []
        # A small space runs out of new candidates: the number of tries is bounded.
        for _ in range(options.offspring * 20):
            if len(found) == options.offspring:
                break
            child = parents[int(rng.integers(len(parents)))]
            if len(parents) > 1 and rng.random() < options.crossover_rate:
                child = crossover(child, parents[int(rng.integers(len(parents)))], rng)
            child = swap(child, self._units, self._step, rng)
            key = key_of(repair(child, self._units, self._budget, rng=rng))
            if key not in seen:
                seen.add(key)
                found.append(key)
        return found

    def _race(self, candidates: Sequence[Key], kept: Sequence[int]) -> None:
        """Race ``candidates`` and add the finalists to the population; ``kept[s]`` of them pass stage ``s``."""
        last = self._fitness.stages - 1
        for stage in range(last):
            candidates = [key for _, key in self._ranked(candidates, stage)][: kept[stage]]
        self._state.population += self._ranked(candidates, last)

    def _survivors(self, count: int) -> list[int]:
        """The number of candidates, out of ``count`` at the start, that pass each stage but the last."""
        kept = []
        for share in self._options.survivors:
            count = max(1, round(count * share))
            kept.append(count)
        return kept

    def _ranked(self, keys: Sequence[Key], stage: int) -> list[tuple[float, Key]]:
        return sorted(zip(self._measure(keys, stage), keys, strict=True))

    def _measure(self, keys: Sequence[Key], stage: int) -> list[float]:
        known = self._state.measured
        new = [key for key in keys if (stage, key) not in known]
        draw = self._state.generation if self._options.resample else 0
        before = self._fitness.tokens
        known |= {(stage, key): loss for key, loss in zip(new, self._fitness(new, stage, draw), strict=True)}
        if new and stage == 0:
            self._state.first_stage = (self._fitness.tokens - before) / len(new)
        return [known[stage, key] for key in keys]

    def _end_generation(self, *, count: bool = True) -> None:
        state = self._state
        state.population = sorted(state.population)[: self._options.population]
        state.generation += int(count)
        state.tokens = self._tokens_before + self._fitness.tokens
        losses = [loss for loss, _ in state.population]
        if not math.isfinite(losses[0]):
            raise MspError(
                f"no candidate of the search has a finite loss, not one of the {len(losses)} that it kept: the outputs "
                "of the pruned model overflow, or the budget leaves too little of it"
            )
        measured = {key for _, key in state.measured}
        for base, effects in state.effects:
            moves = single_moves(base, self._units, self._step)
            measured.update(moves[move] for move in effects)
        evaluations = len(measured)
        step = Step(state.generation, evaluations, state.tokens, losses[0], sum(losses) / len(losses))
        state.history.append(step)
        if self._checkpoint is not None:
            save_state(self._checkpoint, state, self._identity)
        if self._on_step is not None:
            self._on_step(step)

    def _starting(self) -> Identity:
        """The part of the identity that names the constants and the first individuals."""
        options = asdict(self._options)
        # The limits are left out, so that a user can resume a search with a higher limit.
        found = {f"search option {name}": str(options[name]) for name in options.keys() - {"generations", "tokens"}}
        return {**dict(sorted(found.items())), FIRST: hashed_data([list(key_of(levels)) for levels in self._seeds])}


def asked(units: Sequence[Unit], budget: Budget, seed: int) -> Identity:
    """The part of a search's identity that is known before any work."""
    labels = [[unit.name, unit.linears, [level.label for level in unit.levels]] for unit in units]
    return {
        "seed": str(seed),
        "budget": str(budget.limit),
        # The names of these two entries stay, so that older checkpoints can be resumed.
        "patterns": hashed_data(labels),
        "costs of the patterns": hashed_data([unit.costs for unit in units]),
    }


def _run_lengths(longest: int) -> list[int]:
    """The lengths 1, 2, 3, 4, 6, 8, 12 ... up to ``longest``: two to each octave."""
    lengths = {2**octave * part // 2 for octave in range(longest.bit_length() + 1) for part in (2, 3)}
    return sorted(length for length in lengths if length <= longest)
