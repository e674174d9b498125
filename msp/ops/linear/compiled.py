"""The structs by which the compiled modules know a weight: its addresses and sizes by name.

Making one costs more than a small product, so it is remembered with the bitmask, and used as long as nothing in it
changes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES
from msp.formats.positions import Counted


def make_struct(kind: Any, values: Tensor, bitmask: Tensor, n: int, m: int, columns: int) -> Any:
    """``kind`` (``_cpu.PackedRows`` or ``_cuda.TiledWeight``) of contiguous parts, which must outlive it."""
    return kind(
        values_ptr=values.data_ptr(),
        bitmask_ptr=bitmask.data_ptr(),
        dtype_code=VALUE_DTYPES.index(values.dtype),
        rows=values.shape[0],
        columns=columns,
        group_size=m,
        n=n,
    )


def struct_of(kind: Any, values: Tensor, bitmask: Tensor, n: int, m: int, columns: int, counted: Counted) -> Any:
    """The same, remembered in ``counted``, which stands for the bitmask's shape, n, m and columns."""
    found = counted.derived.get("struct")
    addresses = values.data_ptr(), bitmask.data_ptr(), values.dtype, kind
    if found is not None and found[0] == addresses:
        return found[1]
    struct = make_struct(kind, values, bitmask, n, m, columns)
    counted.derived["struct"] = addresses, struct
    return struct
