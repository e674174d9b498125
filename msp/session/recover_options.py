"""The options of ``recover``, parsed once and checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msp.base.reading import shown
from msp.errors import UsageError
from msp.models.loading import find_device
from msp.plan.plans import parse_bytes
from msp.recovery import LossWeights, Recovery, get_recovery
from msp.recovery.training import Schedule, check_trainer
from msp.session.declarations import completed
from msp.session.recover_arguments import RecoverArguments
from msp.text.text_sources import DEFAULT_CALIBRATION, TokenSource
from msp.text.token_sets import check_seed
from msp.text.training_sets import parse_tokens

COUNTS = ("epochs", "batch_tokens", "forward_tokens", "held_out_tokens", "measurements", "test_tokens")


@dataclass(frozen=True)
class RecoverOptions:
    """What a recovery was asked for; the names are those of ``RecoverArguments``."""

    method: Recovery
    weights: LossWeights
    calibration: str
    evaluate: str | None
    window: int | None
    tokens: int
    epochs: int
    batch_tokens: int
    forward_tokens: int
    held_out_tokens: int
    measurements: int
    test_tokens: int
    hidden_bytes: int
    seed: int
    device: torch.device
    dequantise: bool
    trust_remote_code: bool
    resume: bool
    work_dir: Path | None

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> RecoverOptions:
        """Check and complete ``arguments``; loads nothing.

        Raises:
            UsageError: an option is unknown or wrong.
            MspError: a text source cannot be read, or accelerate is not installed.
        """
        asked = completed(arguments, RecoverArguments)
        rate = asked["learning_rate"]
        if rate is not None and not isinstance(asked["method"], str):
            raise UsageError("a method that is an object has its own learning rate: leave learning_rate out")
        method = get_recovery(asked["method"], **({} if rate is None else {"learning_rate": rate}))
        for name in COUNTS:
            if not isinstance(asked[name], int) or asked[name] < 1:
                raise UsageError(f"{name} {shown(asked[name])} is not a whole number from 1")
        if asked["window"] is not None and asked["window"] < 2:
            raise UsageError(f"a window of {asked['window']} tokens predicts nothing: the least is 2")
        check_seed(asked["seed"])
        if asked["resume"] and asked["work_dir"] is None:
            raise UsageError("resume needs work_dir, the folder with the checkpoints of the training")
        device = find_device(asked["device"])
        if device.type not in ("cpu", "cuda") or device.index not in (None, 0):
            raise UsageError(
                f"recovery trains on the CPU or on the first GPU, not on {device}: see CUDA_VISIBLE_DEVICES"
            )
        options = cls(
            method=method,
            weights=LossWeights() if asked["kl_weight"] is None else LossWeights.of_share(asked["kl_weight"]),
            calibration=asked["calibration"] or DEFAULT_CALIBRATION,
            tokens=parse_tokens(asked["tokens"]),
            hidden_bytes=parse_bytes(asked["hidden_bytes"]),
            device=device,
            work_dir=None if asked["work_dir"] is None else Path(asked["work_dir"]),
            **{name: asked[name] for name in (*COUNTS, *TAKEN_OVER)},
        )
        for source in (options.calibration, options.evaluate):
            if source is not None:
                TokenSource.parse(source).check()
        check_trainer()
        return options

    def forwards(self, window: int) -> tuple[int, int]:
        """The windows in one forward, and the forwards in one pass over the text."""
        windows = max(1, self.tokens // (self.epochs * window))
        together = min(windows, max(1, min(self.batch_tokens, self.forward_tokens) // window))
        return together, windows // together

    def schedule(self, window: int) -> Schedule:
        """The schedule of every phase."""
        together, _ = self.forwards(window)
        accumulate = max(1, round(self.batch_tokens / (together * window)))
        return Schedule(self.epochs, accumulate, self.method.learning_rate, self.measurements, self.seed)


# What needs no parsing.
TAKEN_OVER = ("evaluate", "window", "seed", "dequantise", "trust_remote_code", "resume")
