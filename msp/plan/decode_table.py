"""How long linears take to decode a token, as measured: what a budget in time counts in.

As JSON: ``{"tokens": 1, "dtype": "bfloat16", "machine": {...}, "linears": [{"shape": [out, in], "microseconds":
{"dense": 100.1, "2:8": 40.2, ...}}, ...]}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msp.base.files import write_text
from msp.base.reading import array, plain, read_json, real, table, text, whole
from msp.errors import MspError, UsageError
from msp.formats.storage import DENSE, Storage

Shape = tuple[int, int]
# Rounding every time to this part of the dense model's moves a prediction by less than measuring again does, and sums
# of so few different ones are quickly brought to meet a budget.
RESOLUTION = 1_000_000
# An hour: whatever takes longer for a token was not measured, and sums of such times leave what integers are kept in.
MOST_MICROSECONDS = 3.6e9


@dataclass(frozen=True, repr=False)
class DecodeTable:
    """Microseconds of a call of a linear on one token.

    Attributes:
        dtype: of weights and activations, like ``bfloat16``.
        machine: what was measured on.
        times: by ``(out, in)`` and the label of a storage; ``dense`` is one of them.
    """

    dtype: str
    machine: Mapping[str, Any]
    times: Mapping[Shape, Mapping[str, float]]

    def __repr__(self) -> str:
        storages = len({storage for times in self.times.values() for storage in times})
        return f"DecodeTable({self.dtype}: {len(self.times)} shapes in {storages} storages each)"

    def nanoseconds(self, shape: Shape, storage: Storage) -> int:
        """Of a linear in ``storage``.

        Raises:
            UsageError: that was not measured.
        """
        try:
            return round(1000 * self.times[shape][storage.label])
        except KeyError:
            raise UsageError(
                f"the decode table has no time for {storage.label} at {shape[0]} x {shape[1]}: measure this model with "
                "these patterns"
            ) from None

    def rounded(self, shapes: Iterable[Shape]) -> DecodeTable:
        """Every time as a multiple of what ``RESOLUTION`` is of a model with linears of ``shapes``."""
        grid = max(1, sum(self.nanoseconds(shape, DENSE) for shape in shapes) // RESOLUTION) / 1000
        rounded = {
            shape: {name: round(time / grid) * grid for name, time in times.items()}
            for shape, times in self.times.items()
        }
        return replace(self, times=rounded)

    def to_json(self) -> dict[str, Any]:
        linears = [{"shape": list(shape), "microseconds": dict(times)} for shape, times in self.times.items()]
        return {"tokens": 1, "dtype": self.dtype, "machine": dict(self.machine), "linears": linears}

    def save(self, path: Path) -> None:
        """Write ``path`` in one step, and its folder if need be; ``MspError`` where it cannot be written."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> DecodeTable:
        """Read what ``save`` wrote; ``MspError`` names the file when it is no decode table."""
        try:
            content = table(read_json(path), "the file", ("dtype", "machine", "linears"))
            times: dict[Shape, dict[str, float]] = {}
            for index, entry in enumerate(array(content["linears"], "linears")):
                name = f"linears[{index}]"
                shape, found = (table(entry, name, ("shape", "microseconds"))[key] for key in ("shape", "microseconds"))
                rows, columns = (whole(size, f"{name}.shape", 1) for size in array(shape, f"{name}.shape", 2))
                if (rows, columns) in times:
                    raise MspError(f"{name}: {rows} x {columns} stands there twice")
                times[rows, columns] = {
                    pattern: real(time, f"{name}: {pattern}") for pattern, time in table(found, name).items()
                }
            read = cls(text(content["dtype"], "dtype"), plain(table(content["machine"], "machine"), "machine"), times)
        except MspError as error:
            raise MspError(f"{path} is not a decode table of msp measure: {error}") from error
        if not all(0 < time < MOST_MICROSECONDS for patterns in times.values() for time in patterns.values()):
            raise MspError(f"{path}: a time is not a positive number of microseconds")
        return read
