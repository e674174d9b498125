"""The one table of the numbers of tokens, and of the shares of bytes, by which ``nm_linear`` chooses how to multiply.

"Measured" and "arithmetic" say where a number comes from. ``docs/cpu.md`` and ``docs/kernels/nm_linear.md`` give the
reasons. The CPU kernels choose among their own paths in ``csrc/cpu/nm_linear.cpp``, by numbers measured there.
"""

from __future__ import annotations

import torch

ANY_NUMBER = 1 << 62

# --- CPU: measured at 4096 x 4096 ---

# Few tokens are multiplied by the packed weight as it lies in memory. With more, the time goes into arithmetic, and if
# torch's is faster than ours, a few rows at a time are unpacked for its dense product. By instruction set and dtype:
FEW_TOKENS = {
    ("amx", torch.bfloat16): 1024,
    ("amx", torch.float32): 48,
    ("avx512", torch.float32): 48,
    ("avx512bf16", torch.bfloat16): ANY_NUMBER,
    ("avx512bf16", torch.float16): ANY_NUMBER,
    ("avx512bf16", torch.float32): ANY_NUMBER,
}
FEW_TOKENS_ELSEWHERE = 16
# The bytes of dense rows that are made at a time for more tokens than that.
UNPACKED_BYTES = 16 << 20

# --- Triton: arithmetic ---

# With more tokens the weight is unpacked once, and tensor cores do the rest.
SKINNY_TOKENS = 16

# --- CUDA: arithmetic, none is measured yet ---

# The gather loads an activation for each kept weight and token, so its cost grows with the number of tokens.
GATHER_TOKENS = 2
# Patterns without an expansion gather in several passes over the weight, of this many tokens each, as long as the
# passes read fewer bytes than a dense product.
GATHER_PASS = 4
# The weight is expanded once for every 32 tokens. Above the first number of tokens, unpacking the whole weight is
# cheaper. If ``fast_prefill`` kept fragments for sparse tensor cores, or the dense weight, their product is cheaper
# above the second or the third number.
EXPAND_TOKENS, EXPAND_TOKENS_BEFORE_SPMM, EXPAND_TOKENS_BEFORE_DENSE = 192, 64, 96
# At 115 tokens an expansion takes as long as reading a dense weight. From this number on it takes 5 % longer.
SLOWER_TOKENS = 120
# Sparse tensor cores need their own fragment order. If it is made for each product, it pays from this number on.
SPMM_TOKENS = 1024
# A weight is kept dense on the device if its packed form takes more than this share of the dense bytes.
DENSE_SHARE = 0.85


def few_tokens(dtype: torch.dtype, isa: str) -> int:
    """The most tokens for which a CPU with this instruction set multiplies by the packed weight."""
    return FEW_TOKENS.get((isa, dtype), FEW_TOKENS_ELSEWHERE)
