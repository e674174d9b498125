"""The plan of a run before it starts, and the check that its memory suffices."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from msp.base.host_memory import available, resident
from msp.base.progress import NoProgress, Progress
from msp.base.readable import size
from msp.base.safetensors_files import tensor_files
from msp.errors import MspError, UsageError
from msp.models.loading import find_device
from msp.plan.plans import Goal
from msp.session.footprint import Footprint, predict
from msp.session.opened import Opened, open_skeleton, window_of
from msp.session.options import Options

# If a run surely leaves this many bytes free, its memory is not estimated, because an estimate takes a second.
AMPLE = 8 << 30


@dataclass(frozen=True, repr=False)
class Preview:
    """The plan of ``prune`` with some options.

    Attributes:
        model: the source of the model.
        blocks, units, linears: the numbers of blocks, of units that get a level, and of linears in them.
        skipped: linears that stay dense, with the reason.
        objective: the unit of the budget: ``weights``, ``bytes`` or ``nanoseconds``.
        budget, dense_cost: the budget, and the cost of the dense model, in that unit.
        bytes: bytes of all tensors of the ``dense`` model, and an estimate for the ``packed`` model.
        memory: an estimate of the host memory; None for a GPU, which holds the weights in its own memory.
        available: bytes of free host memory.
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

    def __repr__(self) -> str:
        memory = "" if self.memory is None else f", {size(self.memory.peak)} of memory, {size(self.available)} free"
        sizes = f"{size(self.bytes['dense'])} -> about {size(self.bytes['packed'])}"
        return f"Preview({self.model}: {self.units} units of {self.blocks} blocks, {sizes}{memory})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": None if self.memory is None else self.memory.to_json()}


def preview(model: str | Path, options: Options, progress: Progress | None = None) -> Preview:
    """Plan a run of ``prune`` on ``model`` with ``options``, without reading any weight or any text.

    Raises:
        UsageError, MspError: the errors of ``prune`` that need neither the weights nor the text.
    """
    opened = open_skeleton(model, options)
    plan = opened.plan(options, progress or NoProgress())
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
        _memory(opened, options, packed, plan),
        available(),
    )


def _memory(opened: Opened, options: Options, packed: int, plan: Any) -> Footprint | None:
    if opened.device.type != "cpu":
        return None
    window = window_of(opened.model, options.window)
    return predict(opened.model, opened.structure, plan, options, window=window, packed=packed)


def fitting(model: Any, options: Options, *, may_stream: bool) -> Options:
    """``options`` that fit the free memory: if the whole model does not fit, it is streamed one block at a time.

    Memory is estimated only if it may be short. A model that is in memory already, or that goes to a GPU, is not
    checked.

    Raises:
        MspError: the streamed model does not fit either; the message gives the needed and the free bytes.
    """
    is_here = isinstance(model, (str, Path)) and Path(model).is_dir()  # nothing is fetched for a look
    if not is_here or options.dequantise or find_device(options.device).type != "cpu":
        return options
    try:
        sizes = [file.stat().st_size for file in tensor_files(Path(model))]
        if available() > AMPLE + 4 * sum(sizes):
            return options
        needed, room = _needed(model, options), available()
    except MspError:  # the run raises the same error
        return options
    if needed is None or needed <= room:
        return options
    short = f"{model}: this takes about {needed:,} bytes of memory more, and {room:,} are free"
    if may_stream and not options.stream:
        try:
            streamed = options.streamed()
            least, room = _needed(model, streamed), available(max(sizes, default=0))
        except UsageError as error:
            raise MspError(f"{short}; one block at a time is no way out: {error}") from error
        if least is not None and least <= room:
            warnings.warn(f"{short}: the model is streamed, one block at a time", stacklevel=3)
            return streamed
        short += f"; one block at a time it is {least:,} of {room:,}"
    raise MspError(f"{short}: free some, or take fewer test tokens, a shorter window or less hidden_bytes")


def _needed(model: str | Path, options: Options) -> int | None:
    """The bytes that a run needs beyond the memory of the process now; None if they are not estimated."""
    if options.goal.objective == "nanoseconds":  # to measure times takes long, and memory hardly depends on them
        options = replace(options, goal=Goal(Fraction(1, 2)))
    memory = preview(model, options).memory
    return None if memory is None else memory.peak - resident()
