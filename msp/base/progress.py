"""The interface through which long work reports its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """A callback that a stage calls as it proceeds."""

    def __call__(self, done: int, total: int | None = None, /, **info: object) -> None:
        """Report that ``done`` steps are finished since the start of the stage; ``total`` replaces the stage's total.

        ``info`` holds figures to show next to the bar (``best=0.61``).
        """


class Progress(Protocol):
    """Displays the stages of a run. Stages may be nested."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Begin a stage of ``total`` steps; None if the number is not known yet. Users see its ``name``."""


class NoProgress:
    """Displays nothing; the default."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        def advance(done: int, total: int | None = None, /, **info: object) -> None:
            pass

        yield advance
