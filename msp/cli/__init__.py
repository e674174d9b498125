"""The command ``msp``: one verb per thing a user wants, each a thin skin over ``msp.pipeline``."""

from __future__ import annotations

from msp.cli import searching as searching
from msp.cli.verbs import app

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    app()
