"""Token sets of a training: how the tokens of one text are split into training, held-out and test."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from msp.base.reading import LARGEST, shown
from msp.errors import MspError, UsageError
from msp.text.text_sources import TokenSource
from msp.text.token_sets import check_seed, read_windows, token_windows

COUNT_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def parse_tokens(count: str | int) -> int:
    """The whole number of a text like ``"2M"``, ``"500k"`` or ``"1.5M"``.

    Raises:
        UsageError: it is no whole number from 1.
    """
    written = count if isinstance(count, str) else shown(count)
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kMB]?)\s*", written)
    found = Fraction(match[1]) * COUNT_UNITS[match[2]] if match else Fraction(0)
    if not 1 <= found <= LARGEST or found.denominator != 1:
        raise UsageError(f"{shown(count)} is not a number of tokens, like 500k or 2M")
    return int(found)


@dataclass(frozen=True)
class TrainingSets:
    """Three disjoint sets of windows, int64 ``[S, window]`` each, and the sources for the recipe."""

    training: Tensor
    held_out: Tensor
    test: Tensor
    sources: dict[str, str | int]


def make_training_sets(
    source: str,
    tokenizer: Any,
    vocab_size: int,
    *,
    window: int,
    training: int,
    held_out: int,
    test: int,
    evaluate: str | None = None,
    left_out: int = 0,
    seed: int = 0,
) -> TrainingSets:
    """Split text into windows that are trained on, windows that judge the training, and windows for the final figure.

    Test windows are the first of ``evaluate`` or, if that is None or the same text, the first of ``source``. The next
    windows of ``source`` are held out. So neither set depends on ``seed`` or on the length of the training. The
    windows after them are trained on, in the order that ``seed`` draws.

    Args:
        window: tokens per sequence.
        training, held_out, test: numbers of windows, at least 1.
        left_out: the number of windows at the beginning of ``source`` that are not trained on.

    Raises:
        MspError: there are too few tokens (the message has the numbers); all that reading raises.
        UsageError: no seed, or a window shorter than 2.
    """
    check_seed(seed)
    parsed = TokenSource.parse(source).check()
    other = None if evaluate is None else TokenSource.parse(evaluate).check()
    same = other is None or parsed.same_text(other)
    first = max(test if same else 0, left_out)
    needed = first + held_out + training
    tokens = parsed.read(tokenizer, vocab_size, limit=needed * window)
    windows = token_windows(tokens, window)
    if len(windows) < needed:
        raise MspError(
            f"{source} is too short: {len(tokens)} tokens found, {needed * window} needed ({training} training, "
            f"{held_out} held-out and {first} test windows of {window} tokens); give more text, train on fewer tokens "
            "or make more passes over the text (epochs)"
        )
    if same:
        of_test = windows[:test].clone()
    else:
        assert evaluate is not None
        of_test = read_windows(evaluate, tokenizer, vocab_size, window=window, tokens=test * window)
    start = first + held_out
    order = torch.randperm(training, generator=torch.Generator().manual_seed(seed)) + start
    sets = TrainingSets(windows[order], windows[first:start].clone(), of_test, {})
    sets.sources.update(
        calibration=parsed.shown,
        evaluate=f"{parsed.shown} (held out)" if other is None or same else other.shown,
        window=window,
        training_tokens=sets.training.numel(),
        held_out_tokens=sets.held_out.numel(),
        test_tokens=sets.test.numel(),
    )
    return sets
