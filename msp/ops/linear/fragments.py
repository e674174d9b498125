"""``nm_linear`` on 2:4 sparse tensor cores, for weights whose aligned groups of 4 keep at most 2.

``pack`` brings a weight into the order of tensor core fragments, at 9 bits a weight (16-bit values), and ``multiply``
multiplies with them. ``plan`` decides when that pays.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES, count_bits, unpack_bits
from msp.formats.patterns import NMPattern
from msp.formats.positions import check_compliant, check_parts, check_positions
from msp.ops._compiled import compiled
from msp.ops._dispatch import cuda_serves
from msp.ops.linear import rows as in_rows
from msp.ops.linear.layout import Layout, Size

SPARSE_DTYPES = (torch.float16, torch.bfloat16)
# A block of fragments is what a warp reads; a weight is padded to whole tiles.
BLOCK_ROWS, BLOCK_COLUMNS, TILE_ROWS, TILE_COLUMNS = 16, 64, 128, 256


def is_compliant(bitmask: Tensor, m: int) -> bool:
    """Whether every aligned group of 4 keeps at most 2, so that 2:4 sparse tensor cores can multiply with it.

    Args:
        bitmask: uint8 ``[R, ceil(K/8)]`` of a packed weight, in rows or in tiles.
        m: its group size; fours are aligned with groups only where it is a multiple of 4.
    """
    if m % 4:
        raise ValueError(f"group size {m} is not a multiple of 4")
    return not bool((count_bits(bitmask, 4) > 2).any())


def fragment_bytes(rows: int, columns: int) -> int:
    """Bytes of a ``[rows, columns]`` weight in fragment order, padded to whole tiles."""
    size: int = compiled("msp._cuda").nm_spmm_fragment_bytes(rows, columns)
    return size


def pack(
    values: Tensor, bitmask: Tensor, columns: int, n: int, m: int, out: Tensor | None = None, *, checked: bool = False
) -> Tensor:
    """A packed weight in fragment order, for ``multiply``.

    Args:
        values, bitmask: of a compliant ``[R, columns]`` weight that keeps ``n`` of every ``m``, fp16 or bf16, on a GPU.
        out: uint8 of at least ``fragment_bytes(R, columns)``, to be used again for weight after weight.
        checked: whether the bitmask is known to keep ``n`` of every ``m`` and at most 2 of every 4.

    Returns:
        ``out``, or a new tensor.
    """
    rows = values.shape[0]
    size = fragment_bytes(rows, columns)
    if values.dtype not in SPARSE_DTYPES:
        raise TypeError(f"values are {values.dtype}, but sparse tensor cores need float16 or bfloat16")
    if not checked:
        _check_compliant(values, bitmask, columns, n, m)
    if out is None:
        out = values.new_empty(size, dtype=torch.uint8)
    if out.dtype != torch.uint8 or not out.is_contiguous() or out.numel() < size or out.device != values.device:
        raise ValueError(f"out must be {size} contiguous bytes of uint8 on {values.device}")
    values, bitmask = values.contiguous(), bitmask.contiguous()
    with torch.cuda.device(values.device):
        compiled("msp._cuda").nm_spmm_pack(
            values_ptr=values.data_ptr(),
            bitmask_ptr=bitmask.data_ptr(),
            fragments_ptr=out.data_ptr(),
            rows=rows,
            columns=columns,
            group_size=m,
            n=n,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out


def _check_compliant(values: Tensor, bitmask: Tensor, columns: int, n: int, m: int) -> None:
    check_parts(values, bitmask, n, m, columns)
    check_positions(bitmask, n, m, columns)
    check_compliant(bitmask, n, m)


def unpack_fragments(fragments: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[rows, columns]`` in ``dtype`` that ``pack`` brought into fragment order.

    ``docs/kernels/nm_spmm.md`` draws a block: lane 4r + t has, of the rows r and r + 8, two values for each of the
    four columns that begin at 4t and at 16 + 4t of each half, and a code of 4 bits says where both belong.
    """
    slabs, blocks = -(-rows // TILE_ROWS) * (TILE_ROWS // BLOCK_ROWS), -(-columns // TILE_COLUMNS) * 4
    words = fragments[: slabs * blocks * 1152].view(slabs, blocks, 1152)
    # step, row in half, t, quad of the lane, half, place of two -> slab, half, row, block, step, quad, t, place
    values = words[..., :1024].contiguous().view(dtype).view(slabs, blocks, 2, 8, 4, 2, 2, 2)
    values = values.permute(0, 6, 3, 1, 2, 5, 4, 7)
    # row in half, lane of the row (two for each step), half, code -> the same order, a code for each quad
    metadata = words[..., 1024:].contiguous().view(torch.int16).view(slabs, blocks, 8, 4, 2)
    codes = torch.stack([(metadata >> shift) & 15 for shift in (0, 4, 8, 12)], -1)
    # the lanes 2 * step + quad // 4 of a row have the codes of its quads, four each
    codes = codes.view(slabs, blocks, 8, 2, 2, 2, 4).permute(0, 5, 2, 1, 3, 4, 6)
    dense = torch.zeros(*codes.shape, 4, dtype=dtype, device=fragments.device)
    places = torch.stack([codes & 3, codes >> 2], -1).long()
    dense.scatter_(-1, places, values.reshape(places.shape))
    return dense.reshape(slabs * BLOCK_ROWS, blocks * BLOCK_COLUMNS)[:rows, :columns]


def reference(x: Tensor, fragments: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return F.linear(x, unpack_fragments(fragments, rows, x.shape[-1], x.dtype), bias)


op = in_rows.op.form("fragments", reference)


def multiply(x: Tensor, fragments: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """``x W^T + b`` with what ``pack`` returned for W.

    Args:
        x: ``[..., K]`` fp16 or bf16, on a GPU; any strides.
        fragments: of a ``[rows, K]`` weight in the dtype of ``x``.
        bias: ``[rows]``, same dtype and device.

    Returns:
        ``[..., rows]`` in the dtype of ``x``; products are summed in fp32.
    """
    columns = x.shape[-1]
    if x.dtype not in SPARSE_DTYPES:
        raise TypeError(f"x is {x.dtype}, but sparse tensor cores need float16 or bfloat16")
    fits = fragments.dtype == torch.uint8 and fragments.is_contiguous()
    if not fits or fragments.numel() < fragment_bytes(rows, columns) or fragments.device != x.device:
        raise ValueError(f"fragments are not those of a [{rows}, {columns}] weight on {x.device}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, but must be {x.dtype} [{rows}] on {x.device}")
    return op(x, fragments, bias, rows)


@op.backend("cuda", available=lambda: cuda_serves("nm_spmm"))
def cuda(x: Tensor, fragments: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    # the kernels copy 16 bytes of a row at a time
    if columns % 8:
        flat = F.pad(flat, (0, -columns % 8))
    flat = flat.contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    tokens = flat.shape[0]
    y = x.new_empty(*x.shape[:-1], rows)
    bias = None if bias is None else bias.contiguous()
    module = compiled("msp._cuda")
    with torch.cuda.device(x.device):
        workspace = x.new_empty(module.nm_spmm_workspace_bytes(tokens, rows, flat.shape[1]), dtype=torch.uint8)
        module.nm_spmm(
            x_ptr=flat.data_ptr(),
            fragments_ptr=fragments.data_ptr(),
            bias_ptr=0 if bias is None else bias.data_ptr(),
            y_ptr=y.data_ptr(),
            workspace_ptr=workspace.data_ptr(),
            dtype_code=VALUE_DTYPES.index(x.dtype),
            tokens=tokens,
            rows=rows,
            columns=flat.shape[1],
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return y


class Fragments(Layout):
    """The order of sparse tensor cores: in the place of values fragments, viewed in their dtype; the bitmask in rows.

    It is made for products of many tokens only, so a module holds it beside its tiles, see ``fast_prefill``.
    """

    name: ClassVar[str] = "fragments"

    def serves(self, weight: Size) -> bool:
        compliant = weight.compliant or weight.pattern.always_compliant
        fits = weight.dtype in SPARSE_DTYPES and weight.pattern.n > 0 and compliant
        return fits and weight.device.type == "cuda" and cuda_serves("nm_spmm")

    def arrange(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        return pack(values, bitmask, columns, pattern.n, pattern.m).view(values.dtype), bitmask

    def restore(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        dense = unpack_fragments(values.view(torch.uint8), bitmask.shape[0], columns, values.dtype)
        return dense[unpack_bits(bitmask, columns)].view(bitmask.shape[0], -1), bitmask

    def product(
        self,
        x: Tensor,
        values: Tensor,
        bitmask: Tensor,
        bias: Tensor | None,
        pattern: NMPattern,
        columns: int,
        compliant: bool = False,
        kept: Tensor | None = None,
    ) -> Tensor:
        if x.dtype != values.dtype:
            raise TypeError(f"x is {x.dtype}, but the fragments are those of {values.dtype}")
        return multiply(x, values.view(torch.uint8), bias, bitmask.shape[0])


FRAGMENTS = Fragments()
