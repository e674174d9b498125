"""Checks once for each bitmask, not for each call, that it keeps exactly N of every M.

A kernel walks along the values by the bits of the bitmask, so with too many bits it would read past their end. To count
the bits takes longer than many a product. A counted bitmask is therefore remembered by its memory, and by the version
that torch raises with every write. A bitmask that is new or changed (loaded, assigned, copied, moved, written to, its
``.data`` exchanged) has another mark, and is counted before a kernel reads it. torch does not notice writes that go
through ``.data``, through numpy, or into tensors of its inference mode; nor does this module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msp.errors import MspError
from msp.formats.storage import packed_widths


class Counted:
    """A bitmask that was counted, and what was derived from it and from values, for as long as it stays as it is.

    Attributes:
        derived: by name, with what says whether it still holds. Nothing here may hold the bitmask itself.
    """

    __slots__ = ("bitmask", "derived", "mark")

    def __init__(self, bitmask: weakref.ref[Tensor] | None, mark: tuple[Any, ...]) -> None:
        self.bitmask = bitmask
        self.mark = mark
        self.derived: dict[str, Any] = {}


_known: dict[tuple[int, str], Counted] = {}


def count_bits(bitmask: Tensor, group_size: int) -> Tensor:
    """Bits set in each group, uint8 ``[R, groups]``; for groups of 4 every half byte counts as one.

    Sums neighbouring bits, then pairs, then half bytes, so that no temporary is larger than the bitmask.
    """
    counts = bitmask - ((bitmask >> 1) & 0x55)
    counts = (counts & 0x33) + ((counts >> 2) & 0x33)
    if group_size == 4:
        return torch.stack((counts & 15, counts >> 4), dim=-1).flatten(1)
    counts = (counts + (counts >> 4)) & 15
    groups = counts.shape[1] * 8 // group_size
    return counts.view(len(counts), groups, group_size // 8).sum(-1, dtype=torch.uint8)


def check_parts(values: Tensor, bitmask: Tensor, n: int, m: int, columns: int) -> None:
    """Check shapes, dtypes and devices of a packed ``[R, columns]`` weight; reads no bit of it.

    Raises:
        TypeError: a bitmask that is not uint8.
        ValueError: sizes that do not fit together, or two devices.
    """
    try:
        kept, index = packed_widths(n, m, columns)
    except MspError as error:
        raise ValueError(f"{n}:{m} is no pattern for {columns} columns: {error}") from error
    if bitmask.dtype != torch.uint8:
        raise TypeError(f"the bitmask is {bitmask.dtype}, but must be torch.uint8")
    found = values.shape, bitmask.shape
    rows = found[0][0] if found[0] else 0
    wanted = (rows, kept), (rows, index)
    if found != wanted:
        raise ValueError(
            f"values have shape {list(found[0])} and bitmask has {list(found[1])}, but {n}:{m} needs "
            f"{list(wanted[0])} and {list(wanted[1])}"
        )
    if bitmask.device != values.device:
        raise ValueError(f"the bitmask is on {bitmask.device}, but the packed values are on {values.device}")


def check_positions(bitmask: Tensor, n: int, m: int, columns: int, name: str = "") -> Counted:
    """Check that ``bitmask`` keeps ``n`` of every ``m`` and has no bit past ``columns``, unless it is known to.

    Args:
        bitmask: uint8 ``[R, ceil(columns / 8)]``, in rows or in tiles: both have the same groups at different places.
        name: the name of the linear, which starts the message.

    Returns:
        The record of the bitmask, the same object in every call until the bitmask changes.

    Raises:
        MspError: gives the number of wrong groups, and the first of them.
    """
    return _once("positions", bitmask, (n, m, columns), lambda: count_positions(bitmask, n, m, columns, name))


def check_compliant(bitmask: Tensor, n: int, m: int) -> None:
    """Check that no aligned group of 4 keeps more than 2, unless it is known to.

    Raises:
        MspError: a group keeps more.
    """
    if n > 2:
        _once("compliant", bitmask, (m,), lambda: _count_compliant(bitmask, m))


def count_positions(bitmask: Tensor, n: int, m: int, columns: int, name: str = "") -> Counted:
    """``check_positions`` that always counts, and remembers the result.

    Raises:
        MspError: as ``check_positions``.
    """
    prefix = f"{name}." if name else ""
    counts, groups = count_bits(bitmask, m), columns // m
    past = counts[:, groups:]
    if past.numel() and (bits := int(past.sum())):
        raise MspError(f"{prefix}bitmask sets {bits} bits past its {columns} columns")
    wrong = counts[:, :groups] != n
    if wrong.any():
        row, group = (int(index) for index in wrong.nonzero()[0])
        raise MspError(
            f"{prefix}bitmask does not keep {n} of every {m} in {int(wrong.sum())} of {wrong.numel()} groups, "
            f"the first in row {row}, group {group}, which keeps {int(counts[row, group])}"
        )
    return _remember("positions", bitmask, (n, m, columns))


def _count_compliant(bitmask: Tensor, m: int) -> Counted:
    if (count_bits(bitmask, 4) > 2).any():
        raise MspError("bitmask keeps more than 2 of some 4, which 2:4 sparse tensor cores cannot multiply with")
    return _remember("compliant", bitmask, (m,))


def version(tensor: Tensor) -> int:
    """A number that torch raises with every write that it sees; -1 for a tensor of inference mode, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def _mark(bitmask: Tensor, of: tuple[int, ...]) -> tuple[Any, ...]:
    return version(bitmask), bitmask.shape, bitmask.stride(), of


def _once(kind: str, bitmask: Tensor, of: tuple[int, ...], count: Callable[[], Counted]) -> Counted:
    address = bitmask.data_ptr()
    found = _known.get((address, kind))
    if found is not None and found.mark == _mark(bitmask, of):
        # another tensor may be at this address after the counted one was freed
        counted = found.bitmask() if found.bitmask is not None else None
        if counted is bitmask:
            return found
        if counted is not None and counted.data_ptr() == address and version(counted) == found.mark[0]:
            return found
    if bitmask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise MspError("a bitmask that is new cannot be counted while a CUDA graph is captured: call once before")
    return count()


def _remember(kind: str, bitmask: Tensor, of: tuple[int, ...]) -> Counted:
    """Record a counted bitmask; the record goes when the tensor is freed."""
    key = bitmask.data_ptr(), kind
    if bitmask.is_meta or not key[0]:
        return Counted(None, ())

    table = _known  # when the interpreter ends, the module's names go before the last tensors

    def forget(reference: weakref.ref[Tensor]) -> None:
        known = table.get(key)
        if known is not None and known.bitmask is reference:
            table.pop(key, None)

    table[key] = counted = Counted(weakref.ref(bitmask, forget), _mark(bitmask, of))
    return counted
