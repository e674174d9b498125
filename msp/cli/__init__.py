"""The command ``msp``: one verb per task, each a thin layer over the function of that name."""

from __future__ import annotations

import msp
from msp.base.namesake import namesake

if not hasattr(msp, "__version__"):  # another project's __init__.py is in the place of msp's
    raise SystemExit(f"msp: {namesake()}")

from msp.cli import exporting as exporting
from msp.cli import recovering as recovering
from msp.cli import searching as searching
from msp.cli.verbs import app

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    app()
