"""Token sets: how the tokens of one text are split into calibration, fitness and test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msp.base.reading import LARGEST, shown
from msp.errors import MspError, UsageError
from msp.text.text_sources import DEFAULT_CALIBRATION, DEFAULT_EVALUATION, SOURCE_FORMS, TokenSource

__all__ = [
    "DEFAULT_CALIBRATION",
    "DEFAULT_EVALUATION",
    "POOL_FACTOR",
    "SOURCE_FORMS",
    "TokenSets",
    "TokenSource",
    "make_token_sets",
    "noised",
    "read_windows",
    "save_tokens",
    "token_windows",
]

# A seed draws its windows from this many times the tokens it needs, so that seeds differ and a huge
# source is still read only at its beginning.
POOL_FACTOR = 8


def check_seed(seed: int) -> None:
    """Raise ``UsageError`` for what torch's or numpy's generators do not take: all but 0 to 2**63 - 1."""
    if not isinstance(seed, int) or not 0 <= seed <= LARGEST:
        raise UsageError(f"seed {shown(seed)} is not a whole number from 0 to {LARGEST}")


def token_windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Cut ``[tokens]`` into non-overlapping windows ``[S, length]``; the rest at the end is dropped."""
    if length < 2:
        raise UsageError(f"a window of {length} tokens predicts nothing: the least is 2")
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def read_windows(
    source: str, tokenizer: Any, vocab_size: int, *, window: int, tokens: int | None = None
) -> torch.Tensor:
    """The first ``tokens`` tokens of ``source`` (all without it) in windows ``[S, window]``, S at least 1.

    Raises:
        MspError: the source is shorter than one window, and all that ``TokenSource.read`` raises.
    """
    limit = None if tokens is None else max(window, tokens)
    found = TokenSource.parse(source).read(tokenizer, vocab_size, limit)
    if len(found) < window:
        raise MspError(f"{source} is too short: {len(found)} tokens found, {window} needed for one window")
    return token_windows(found, window)


@dataclass(frozen=True)
class TokenSets:
    """Three disjoint sets of windows, int64 ``[S, window]`` each, and what the recipe says of them."""

    calibration: torch.Tensor
    fitness: torch.Tensor
    test: torch.Tensor
    window: int
    sources: dict[str, str | int | float]


def make_token_sets(
    source: str,
    tokenizer: Any,
    vocab_size: int,
    *,
    evaluate: str | None = None,
    window: int,
    calibration_tokens: int,
    fitness_tokens: int,
    test_tokens: int | None,
    seed: int,
    fitness_noise: float = 0.0,
) -> TokenSets:
    """Split text into windows for statistics, for the search and for the final figure.

    Calibration and fitness windows are drawn by ``seed`` from ``source``. Test windows never depend
    on the seed: they are the first of ``evaluate``, or, where that is missing or the same text, the
    first of ``source``, which the draw then leaves out.

    Args:
        window: tokens per sequence.
        calibration_tokens: rounded down to windows, at least one (none for 0); so are the other two.
        test_tokens: ``None`` takes all of ``evaluate``.
        fitness_noise: share of the fitness tokens that ``noised`` replaces.

    Raises:
        MspError: too few tokens (says how many were found and needed), and all that reading raises.
        UsageError: a negative count, a window shorter than 2, or no seed.
    """
    check_seed(seed)
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing: the least is 2")
    counts = {"calibration": calibration_tokens, "fitness": fitness_tokens, "test": test_tokens}
    for name, count in counts.items():
        if count is not None and count < 0:
            raise UsageError(f"{count} {name} tokens: a count cannot be negative")
    calibration_windows = _window_count(calibration_tokens, window)
    drawn = calibration_windows + _window_count(fitness_tokens, window)
    parsed = TokenSource.parse(source).check()
    other = TokenSource.parse(evaluate).check() if evaluate is not None else None
    held_out = other is None or parsed.same_text(other)
    if held_out and test_tokens is None:
        raise UsageError(f"say how many test tokens to hold out of {source}, or give another text to evaluate on")
    first = _window_count(test_tokens or 0, window) if held_out else 0

    tokens = parsed.read(tokenizer, vocab_size, limit=max(1, first + POOL_FACTOR * drawn) * window)
    windows = token_windows(tokens, window)
    if len(windows) < first + drawn:
        raise MspError(
            f"{source} is too short: {len(tokens)} tokens found, {(first + drawn) * window} needed "
            f"({calibration_windows} calibration, {drawn - calibration_windows} fitness and {first} test windows "
            f"of {window} tokens); give more text, ask for fewer tokens or shorten the window"
        )
    order = torch.randperm(len(windows) - first, generator=torch.Generator().manual_seed(seed)) + first
    if held_out:
        test = windows[:first].clone()
    else:
        assert evaluate is not None
        test = read_windows(evaluate, tokenizer, vocab_size, window=window, tokens=test_tokens)
    fitness = windows[order[calibration_windows:drawn]]
    if fitness_noise and len(fitness):
        fitness = noised(fitness, fitness_noise, seed)
    sets = TokenSets(windows[order[:calibration_windows]], fitness, test, window, {})
    sets.sources.update(
        calibration=parsed.shown,
        evaluate=f"{parsed.shown} (held out)" if other is None or held_out else other.shown,
        window=window,
        seed=seed,
        calibration_tokens=sets.calibration.numel(),
        fitness_tokens=sets.fitness.numel(),
        fitness_noise=fitness_noise,
        test_tokens=sets.test.numel(),
    )
    return sets


def noised(windows: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """``windows`` with a share of the tokens replaced by others of theirs, drawn by ``seed``.

    The first token of a window stays (models give it a role of its own), and so do the token counts of the
    text: no token comes in that was not there.
    """
    draw = torch.Generator().manual_seed(seed)
    others = windows.flatten()[torch.randint(windows.numel(), windows.shape, generator=draw)]
    replaced = torch.rand(windows.shape, generator=draw) < share
    replaced[:, 0] = False
    return torch.where(replaced, others, windows)


def _window_count(tokens: int, window: int) -> int:
    return max(1, tokens // window) if tokens else 0


def save_tokens(tokens: torch.Tensor | Iterable[int], path: str | Path) -> None:
    """Write tokens as the one tensor of a safetensors file, in one step, to be read back as a source."""
    from msp.base.files import write_tensors

    flat = tokens if isinstance(tokens, torch.Tensor) else torch.tensor(list(tokens), dtype=torch.long)
    write_tensors({"tokens": flat.contiguous()}, path)
