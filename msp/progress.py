"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called as a stage proceeds."""

    def __call__(self, done: int, total: int | None = None, /, **info: object) -> None:
        """``done`` steps are finished, counted from the start of the stage; ``total`` replaces the stage's own.

        ``info`` holds figures worth showing beside the bar (``best=0.61``).
        """


class Progress(Protocol):
    """Listens to the stages of a run. Stages may be nested."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Announce a stage of ``total`` steps (``None``: not known yet), in words a user understands."""


class NoProgress:
    """Listens to nothing: the default."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        def advance(done: int, total: int | None = None, /, **info: object) -> None:
            pass

        yield advance
