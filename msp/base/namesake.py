"""Tells of the other project that the package index has as ``msp``: its package bears the same name as ours.

This project is the distribution ``mixed-sparsity-pruning``. Whichever of the two is installed last overwrites the
other's ``msp/__init__.py``, and uninstalling either takes files of the other along.
"""

from __future__ import annotations

import warnings
from importlib.metadata import distributions

DISTRIBUTION = "mixed-sparsity-pruning"
# a checkout that was built before the distribution had its own name still carries the metadata of that time
_OWN_SUMMARY = "Mixed sparsity pruning:"


def namesake() -> str | None:
    """How to mend an environment in which the other ``msp`` is installed too; None where it is not."""
    for other in distributions(name="msp"):
        summary = other.metadata["Summary"] or ""
        if not summary.startswith(_OWN_SUMMARY):
            return (
                f"the distribution 'msp' {other.version} ({summary}) is installed too. It is another project, whose "
                "files lie in the same folder as ours: pip uninstall msp, then "
                f"pip install --force-reinstall {DISTRIBUTION}"
            )
    return None


def warn_of_namesake() -> None:
    found = namesake()
    if found is not None:
        warnings.warn(found, stacklevel=3)
