"""``nm_linear`` of a weight that is held dense on a device."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import unpack, unpack_bits
from msp.formats.patterns import NMPattern
from msp.ops.linear.layout import Layout, Size
from msp.ops.linear.plan import stays_dense
from msp.ops.linear.rows import op


class Dense(Layout):
    """Unpacked, for a weight whose packed form saves too few bytes; the bitmask stays in rows.

    The product is torch's, whatever backend is forced: ``last_backend`` calls it the reference.
    """

    name: ClassVar[str] = "dense"

    def serves(self, weight: Size) -> bool:
        return weight.device.type == "cuda" and weight.pattern.n > 0 and stays_dense(weight.pattern, weight.dtype)

    def arrange(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        return unpack(values, bitmask, columns), bitmask

    def restore(self, values: Tensor, bitmask: Tensor, pattern: NMPattern, columns: int) -> tuple[Tensor, Tensor]:
        return values[unpack_bits(bitmask, columns)].view(values.shape[0], -1), bitmask

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
        if not torch.compiler.is_compiling():
            op.note("reference")
        return F.linear(x, values, bias)


DENSE = Dense()
