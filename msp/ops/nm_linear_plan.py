"""How ``nm_linear`` computes a product on a CUDA device whose weight lies in tiles: the table, and how work is cut.

Every threshold here is chosen by arithmetic (``docs/kernels/nm_linear.md``), none is measured yet.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from msp.formats.storage import DENSE, Storage
from msp.ops.layouts import TILE_COLUMNS, TILE_ROWS
from msp.patterns import NMPattern

How = Literal["gather", "expand", "spmm", "unpack"]

# One product a kept weight and token: the load of each activation is what more tokens pay for.
GATHER_TOKENS = 2
# Patterns that have no expansion gather on in passes over the weight, as long as these read less than a dense product.
GATHER_PASS = 4
# Expansion once for every 32 tokens, until unpacking all is cheaper; where that was done before (``fast_prefill``),
# until the product with the fragments of sparse tensor cores is, or the dense one.
EXPAND_TOKENS, EXPAND_TOKENS_BEFORE_SPMM, EXPAND_TOKENS_BEFORE_DENSE = 192, 64, 96
# An expansion takes as long as reading a dense weight at 115 tokens, and 5 % longer from so many on.
SLOWER_TOKENS = 120
# Sparse tensor cores need their own fragment order: where it is made for each product, it pays from here on.
SPMM_TOKENS = 1024
# Above this share of the dense bytes a weight is kept dense on the device.
DENSE_SHARE = 0.85

WARPS = 8
# What a block does once, whatever it has to multiply, shows where it has fewer tiles than this.
FEW_TILES = 4
_RING_BYTES, _TABLE_BYTES = 32 << 10, 32 << 10


@dataclass(frozen=True)
class Device:
    """What the cut of the work depends on: multiprocessors, and bytes of shared memory of one."""

    multiprocessors: int
    shared: int

    def block_shared(self, blocks: int = 1) -> int:
        """Most that each of so many blocks can have; the driver keeps 1 KiB of each block's."""
        return self.shared // blocks - 1024


@dataclass(frozen=True)
class Plan:
    """How a product is computed; the sizes are those of ``msp._cuda.nm_linear`` and 0 where it is not called."""

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
    """Whether so little is saved that the weight is better unpacked once, when it comes to a CUDA device."""
    return packed_share(pattern, dtype) > DENSE_SHARE


def kept_bytes(pattern: NMPattern, rows: int, columns: int) -> int:
    """Most bytes of what ``nm_linear_tiles.for_many_tokens`` makes of a weight of 16 bits.

    Fragments have 9 bits a weight and are padded to 128 x 256. What is compliant by choice alone has them too, where
    this says the dense size.
    """
    if pattern.always_compliant:
        return math.ceil(rows / 128) * math.ceil(columns / 256) * (128 * 256 * 9 // 8)
    return 2 * rows * columns


def slower_from_tokens(pattern: NMPattern) -> int:
    """Tokens from which on a product takes over 5 % longer than a dense one, by arithmetic, where nothing is kept."""
    return SLOWER_TOKENS if can_expand(pattern) else GATHER_PASS * math.floor(1 / packed_share(pattern)) + 1


def can_expand(pattern: NMPattern) -> bool:
    """Whether a byte permutation can place a group's values."""
    return pattern.m <= 8 or pattern.n <= 4


@functools.lru_cache(maxsize=4096)
def plan(
    tokens: int, rows: int, columns: int, pattern: NMPattern, compliant: bool, device: Device, kept: bool = False
) -> Plan:
    """The table, first line that holds.

    Args:
        tokens: of the product with a ``[rows, columns]`` weight.
        compliant: whether 2:4 sparse tensor cores can multiply with it and their kernel is there.
        kept: whether what many tokens need is at hand (``nm_linear_tiles.for_many_tokens``).
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
    """Shared memory of a block: ``nm_linear_shared_bytes`` of the kernels."""
    tiles = math.ceil(columns // TILE_COLUMNS / splits)
    # activations: 2 bytes, and a third as much again between the gather's words
    activations = tiles * TILE_COLUMNS * at_once * (3 if how == "gather" else 2)
    return _RING_BYTES + activations + (_TABLE_BYTES if how == "expand" else 0)


def resident_blocks(how: How, at_once: int, columns: int, device: Device) -> int:
    """How many blocks a multiprocessor is to hold at a time: two, or one where two would have few tiles each."""
    few = min(columns // TILE_COLUMNS, FEW_TILES) * TILE_COLUMNS
    return 2 if shared_bytes(how, at_once, few, 1) <= device.block_shared(2) else 1


def cut(how: How, at_once: int, tokens: int, rows: int, columns: int, device: Device) -> Plan:
    """More tokens, more rows a block: its activations are read for all of them. Then splits of the columns until
    ``resident_blocks`` fit a multiprocessor, and until every multiprocessor has some."""
    stripes = {1: 1, 2: 1, 4: 2, 8: 2, 16: 4, 32: 8}[at_once]
    tiles = columns // TILE_COLUMNS
    resident = resident_blocks(how, at_once, columns, device)
    room, splits = device.block_shared(resident), 1
    while splits < tiles and shared_bytes(how, at_once, columns, splits) > room:
        splits += 1
    blocks = math.ceil(rows / (TILE_ROWS * stripes)) * math.ceil(tokens / at_once)
    if how == "expand":
        # no more than leave each warp a tile
        wanted = min(math.ceil(resident * device.multiprocessors / blocks), tiles * stripes // WARPS)
        splits = max(splits, wanted)
    return Plan(how, at_once, stripes, splits)
