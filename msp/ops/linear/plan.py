"""The plan of an ``nm_linear`` product on a CUDA device, for a weight in tiles: which kernel runs, on which blocks.

The numbers of tokens come from ``thresholds``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from msp.formats.patterns import NMPattern
from msp.formats.storage import DENSE, Storage
from msp.ops.linear.thresholds import (
    DENSE_SHARE,
    EXPAND_TOKENS,
    EXPAND_TOKENS_BEFORE_DENSE,
    EXPAND_TOKENS_BEFORE_SPMM,
    GATHER_PASS,
    GATHER_TOKENS,
    SLOWER_TOKENS,
    SPMM_TOKENS,
)
from msp.ops.linear.tile_order import TILE_COLUMNS, TILE_ROWS

How = Literal["gather", "expand", "spmm", "unpack"]

WARPS = 8
# A block with fewer tiles than this spends a noticeable share of its time on the work that it does once.
FEW_TILES = 4
_RING_BYTES, _TABLE_BYTES = 32 << 10, 32 << 10


@dataclass(frozen=True)
class Device:
    """The limits of a CUDA device: the number of multiprocessors, and the bytes of shared memory of each."""

    multiprocessors: int
    shared: int

    def block_shared(self, blocks: int = 1) -> int:
        """The most bytes that each of ``blocks`` blocks on a multiprocessor can have, after the driver's 1 KiB."""
        return self.shared // blocks - 1024


@dataclass(frozen=True)
class Plan:
    """How a product is computed. The sizes are those of ``msp._cuda.LinearCut``, or 0 if it is not called."""

    how: How
    tokens_at_once: int = 0
    stripes: int = 0
    splits: int = 0


@functools.cache
def device_limits(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, found.shared_memory_per_multiprocessor)


@functools.cache
def packed_share(pattern: NMPattern, dtype: torch.dtype = torch.bfloat16) -> float:
    """Packed bytes as a share of the dense ones, at values of ``dtype``."""
    parts = Storage(pattern).packed_parts(1, TILE_COLUMNS).values()
    return sum(part.nbytes(dtype) for part in parts) / DENSE.nbytes(1, TILE_COLUMNS, dtype)


def stays_dense(pattern: NMPattern, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the weight is unpacked when it is moved to a CUDA device, because packing saves too few bytes."""
    return packed_share(pattern, dtype) > DENSE_SHARE


def kept_bytes(pattern: NMPattern, rows: int, columns: int) -> int:
    """The most bytes that ``TILES.for_many_tokens`` returns for a ``[rows, columns]`` weight of 16 bits.

    Fragments have 9 bits a weight and are padded to 128 x 256. A weight that is compliant only by the choice of its
    values also gets fragments, but this function returns the dense size for its pattern.
    """
    if pattern.always_compliant:
        return math.ceil(rows / 128) * math.ceil(columns / 256) * (128 * 256 * 9 // 8)
    return 2 * rows * columns


def slower_from_tokens(pattern: NMPattern) -> int:
    """The number of tokens from which a product takes over 5 % longer than a dense one, by arithmetic.

    It holds for a weight without the fragments, or the dense weight, that ``fast_prefill`` keeps.
    """
    return SLOWER_TOKENS if can_expand(pattern) else GATHER_PASS * math.floor(1 / packed_share(pattern)) + 1


def can_expand(pattern: NMPattern) -> bool:
    """Whether a byte permutation can place a group's values."""
    return pattern.m <= 8 or pattern.n <= 4


@functools.lru_cache(maxsize=4096)
def plan(
    tokens: int, rows: int, columns: int, pattern: NMPattern, compliant: bool, device: Device, kept: bool = False
) -> Plan:
    """The plan of a product; the first condition that holds decides.

    Args:
        tokens: the number of tokens that are multiplied with the weight.
        rows, columns: the shape of the weight.
        compliant: whether 2:4 sparse tensor cores can multiply with the weight and their kernel is installed.
        kept: whether the device already holds the result of ``TILES.for_many_tokens``.
    """
    passes = math.ceil(tokens / GATHER_PASS)
    before = EXPAND_TOKENS_BEFORE_SPMM if compliant else EXPAND_TOKENS_BEFORE_DENSE
    if tokens <= GATHER_TOKENS:
        return cut("gather", tokens, tokens, rows, columns, device)
    if can_expand(pattern) and tokens <= (before if kept else EXPAND_TOKENS):
        at_once = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
        return cut("expand", at_once, tokens, rows, columns, device)
    if passes * packed_share(pattern) <= 1:
        return cut("gather", GATHER_PASS, tokens, rows, columns, device)
    if compliant and (kept or tokens >= SPMM_TOKENS):
        return Plan("spmm")
    return Plan("unpack")


def shared_bytes(how: How, at_once: int, columns: int, splits: int) -> int:
    """Bytes of shared memory of a block; equals ``nm_linear_shared_bytes`` of the kernels."""
    tiles = math.ceil(columns // TILE_COLUMNS / splits)
    # 2 bytes for each activation, and 3 for the gather, which pads its words
    activations = tiles * TILE_COLUMNS * at_once * (3 if how == "gather" else 2)
    return _RING_BYTES + activations + (_TABLE_BYTES if how == "expand" else 0)


def resident_blocks(how: How, at_once: int, columns: int, device: Device) -> int:
    """The number of blocks that a multiprocessor holds at a time: two, or one if each of two would have few tiles."""
    few = min(columns // TILE_COLUMNS, FEW_TILES) * TILE_COLUMNS
    return 2 if shared_bytes(how, at_once, few, 1) <= device.block_shared(2) else 1


def cut(how: How, at_once: int, tokens: int, rows: int, columns: int, device: Device) -> Plan:
    """The plan with its number of stripes and of splits.

    With more tokens a block gets more rows, because it reads the activations once for all its rows. The columns are
    then split until ``resident_blocks`` fit a multiprocessor, and until every multiprocessor has blocks.
    """
    stripes = {1: 1, 2: 1, 4: 2, 8: 2, 16: 4, 32: 8}[at_once]
    tiles = columns // TILE_COLUMNS
    resident = resident_blocks(how, at_once, columns, device)
    room, splits = device.block_shared(resident), 1
    while splits < tiles and shared_bytes(how, at_once, columns, splits) > room:
        splits += 1
    blocks = math.ceil(rows / (TILE_ROWS * stripes)) * math.ceil(tokens / at_once)
    if how == "expand":
        # no more splits than leave each warp a tile
        wanted = min(math.ceil(resident * device.multiprocessors / blocks), tiles * stripes // WARPS)
        splits = max(splits, wanted)
    return Plan(how, at_once, stripes, splits)
