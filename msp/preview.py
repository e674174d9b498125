"""What a run would do, and whether the memory there is suffices, before it does anything."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msp.errors import MspError, UsageError
from msp.footprint import Footprint, available, predict, resident
from msp.loading import find_device
from msp.opened import Opened, open_skeleton, window_of
from msp.packed_files import tensor_files
from msp.progress import NoProgress, Progress
from msp.settings import PruneOptions

# A run that leaves so many bytes free whatever it does is not looked at: that takes a second.
AMPLE = 8 << 30


@dataclass(frozen=True)
class Preview:
    """What ``prune`` with some options would do.

    Attributes:
        units, linears: how many there are to give levels to.
        skipped: linears that stay dense, with the reason.
        objective: what the budget counts, ``weights``, ``bytes`` or ``nanoseconds``.
        budget, dense_cost: of that, how much may stay, and how much the dense model has.
        bytes: of all tensors, of the dense model and about of the packed one.
        memory: an estimate of the host memory; None for a GPU, where the weights are elsewhere.
        available: bytes of memory that are free for it.
    """

    model: str
    blocks: int
    units: int
    linears: int
    skipped: dict[str, str]
    objective: str
    budget: int
    dense_cost: int
    bytes: dict[str, int]
    memory: Footprint | None
    available: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": None if self.memory is None else self.memory.to_json()}


def preview(model: str | Path, settings: PruneOptions, progress: Progress | None = None) -> Preview:
    """Plan to prune ``model`` with ``settings``, reading none of its weights and none of the text.

    Raises:
        UsageError, MspError: as ``prune`` for what it can know before that.
    """
    opened = open_skeleton(model, settings)
    plan = opened.plan(settings, progress or NoProgress())
    packed = opened.expected_bytes(plan)
    return Preview(
        opened.loaded.source,
        len(opened.structure.blocks),
        len(plan.units),
        sum(len(unit.linears) for unit in plan.units),
        dict(plan.skipped),
        plan.objective,
        plan.limit,
        plan.dense_cost,
        {"dense": opened.loaded.stored.dense_bytes, "packed": packed},
        _memory(opened, settings, packed, plan),
        available(),
    )


def _memory(opened: Opened, settings: PruneOptions, packed: int, plan: Any) -> Footprint | None:
    if opened.device.type != "cpu":
        return None
    window = window_of(opened.model, settings.window)
    return predict(opened.model, opened.structure, plan, settings, window=window, packed=packed)


def fitting(model: Any, settings: PruneOptions, *, may_stream: bool) -> PruneOptions:
    """``settings`` for the memory that there is: of one block at a time if the whole model does not fit.

    Looks only where memory may be short, and not at what is in memory already or goes to a GPU.

    Raises:
        MspError: it does not fit so either; says what it needs and what there is.
    """
    if not isinstance(model, (str, Path)) or settings.dequantise or find_device(settings.device).type != "cpu":
        return settings
    try:
        sizes = [file.stat().st_size for file in tensor_files(Path(model))] if Path(model).is_dir() else []
        if sizes and available() > AMPLE + 4 * sum(sizes):
            return settings
        needed, room = _needed(model, settings), available()
    except MspError:  # the run says it
        return settings
    if needed is None or needed <= room:
        return settings
    short = f"{model}: this takes about {needed:,} bytes of memory more, and {room:,} are free"
    if may_stream and not settings.stream:
        streamed = replace(settings, stream=True)
        try:
            streamed.check()
            least, room = _needed(model, streamed), available(max(sizes, default=0))
        except UsageError as error:
            raise MspError(f"{short}; one block at a time is no way out: {error}") from error
        if least is not None and least <= room:
            warnings.warn(f"{short}: the model is streamed, one block at a time", stacklevel=3)
            return streamed
        short += f"; one block at a time it is {least:,} of {room:,}"
    raise MspError(f"{short}: free some, or take fewer test tokens, a shorter window or less hidden_bytes")


def _needed(model: str | Path, settings: PruneOptions) -> int | None:
    """Beyond what the process takes now."""
    if settings.budget_decode is not None:  # times may have to be measured first, and memory hardly depends on them
        settings = replace(settings, budget_decode=None, decode_table=None, sparsity=0.5)
    memory = preview(model, settings).memory
    return None if memory is None else memory.peak - resident()
