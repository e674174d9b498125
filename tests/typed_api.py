"""Wrong calls of the API, for mypy: ``make types`` fails if one of them is no error any more. Nothing runs this."""

from __future__ import annotations

import msp


def wrong() -> None:
    msp.prune("model", sparsty=0.5)  # type: ignore[call-arg]
    msp.search("model", seed="first")  # type: ignore[arg-type]
    msp.compare("model", allocators=["uniform"], stream=True)  # type: ignore[call-arg]
    msp.generate("model", "Once", temperature="hot")  # type: ignore[arg-type]
    msp.evaluate("model").kll  # type: ignore[attr-defined]  # noqa: B018


def right() -> float:
    return msp.prune("model", sparsity=0.5, pruner="wanda", calibration="notes.txt", seed=1).kl
