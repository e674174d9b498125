"""``obs_prune`` on the CPU, compared with SparseGPT's loop over columns, as it is published and run."""

from __future__ import annotations

import pytest
import torch
from runner import measure, products_from_registers
from sparsegpt import BLOCK, error_where_the_choice_agrees, make, published
from torch import Tensor

from msp.formats.patterns import NMPattern
from msp.ops import force_backend, obs_prune
from msp.ops.obs_prune import op, reference


@pytest.mark.parametrize(("size", "pattern"), [(1024, "2:8"), (1024, "2:4"), (1024, "8:32"), (4096, "2:8")])
def test_square(benchmark, size: int, pattern: str) -> None:
    chosen = NMPattern.parse(pattern)
    weight, factor = make(size)

    def ours() -> None:
        with force_backend("cpu"):
            obs_prune(weight, factor, chosen, block_size=BLOCK)

    def sweep() -> tuple[Tensor, Tensor]:
        with force_backend("cpu"):
            return op(weight, factor, chosen.n, chosen.m, BLOCK)

    # As many operations as the updates have, in one product: torch's time for it is the aim, and the products alone are
    # the least time of any fp32 implementation here.
    a, b = torch.randn(size, size // 2), torch.randn(size // 2, size)
    alone = products_from_registers(size**3 // 2)
    measure(
        benchmark,
        ours,
        {
            "published loop": lambda: published(weight, factor, chosen.n, chosen.m),
            "reference": lambda: reference(weight, factor, chosen.n, chosen.m, BLOCK),
            "ours unpacked": sweep,
            "one torch product": lambda: a @ b,
            **({"products alone": alone} if alone else {}),
        },
        error=error_where_the_choice_agrees(*sweep(), weight, factor, chosen.n, chosen.m),
        bound=1e-5,
        flops=size**3,
    )
