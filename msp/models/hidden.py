"""States that wait for the next block, in host memory up to a bound."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable

import torch
from torch import Tensor

from msp.errors import MspError, system_reason
from msp.models.gates import State


class HiddenStates:
    """States by key: in memory up to ``limit`` bytes, what comes beyond them in mapped temporary files.

    Attributes:
        held: bytes in memory now; ``spilled``: bytes in files.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._states: dict[Hashable, tuple[State, bool]] = {}
        self.held = 0
        self.spilled = 0

    def put(self, key: Hashable, state: State) -> None:
        state = state.map(Tensor.detach)
        spills = self.held + state.nbytes > self._limit
        self._states[key] = (state.map(_mapped) if spills else state.to("cpu"), spills)
        self._count(state.nbytes, spills)

    def get(self, key: Hashable) -> State:
        return self._states[key][0]

    def pop(self, key: Hashable) -> State:
        state, spilled = self._states.pop(key)
        self._count(-state.nbytes, spilled)
        return state

    def _count(self, size: int, spilled: bool) -> None:
        if spilled:
            self.spilled += size
        else:
            self.held += size


def _mapped(tensor: Tensor) -> Tensor:
    """A copy in a file that has no name: it goes with the last reference to the copy.

    Raises:
        MspError: the disk is full.
    """
    try:
        # Without a name from the start: nothing is left of it by a kill.
        with tempfile.TemporaryFile(prefix="msp-") as file:
            # To touch a page that the disk has no room for would kill the process.
            if tensor.nbytes:
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            name = f"/proc/self/fd/{file.fileno()}"
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise MspError(
            f"{tempfile.gettempdir()}: {tensor.nbytes:,} bytes of hidden states cannot be written: "
            f"{system_reason(error)}; set TMPDIR to a folder with room, or allow more hidden_bytes in memory"
        ) from error
    return mapped.view(tensor.shape).copy_(tensor)
