"""``nm_linear``: ``y = x W^T + b`` with W in packed form."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from msp.formats.packed_weight import CodedWeight, PackedWeight
from msp.ops.linear.rows import ROWS, op


def coded_reference(x: Tensor, packed: CodedWeight, bias: Tensor | None) -> Tensor:
    """Unpack to the dtype of ``x`` and multiply; gradients flow to ``x`` and ``bias``."""
    return F.linear(x, packed.unpack(x.dtype), bias)


def nm_linear(x: Tensor, packed: PackedWeight | CodedWeight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with W in packed form; gradients flow to ``x``, ``bias`` and the kept values that are floats.

    On a GPU the CUDA kernels serve a weight of 16 bits that is made of their tiles (16 rows x 256 columns), and Triton
    any other, or where ``msp._cuda`` is not built. The kernels for few tokens read their own order of the weight. The
    first call makes a copy in that order, which takes as much memory again and goes with ``packed``; it is made anew
    after a write to the values. Values that are trained have no copy and are unpacked in each call. ``SparseLinear``
    holds that order only.

    Args:
        x: ``[..., K]``, in the dtype and on the device of ``packed``; any strides. Coded values have no dtype of their
            own, and are multiplied by the reference only.
        packed: a ``[R, K]`` weight. An empty one (N = 0) costs no product. The bits of its bitmask are counted in the
            first call and in the first one after a write to it. torch does not see writes through ``.data``.
        bias: ``[R]``, same dtype and device.

    Returns:
        ``[..., R]`` in the dtype of ``x``; products are summed in fp32.

    Raises:
        TypeError: dtypes differ.
        ValueError: a shape or device that does not fit.
        UsageError: coded values, and a backend was forced.
        MspError: the parts of ``packed`` do not fit together, or its bitmask keeps another number than N.
    """
    if isinstance(packed, CodedWeight):
        if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
            raise ValueError(f"x has shape {list(x.shape)}, but its last dimension must be {packed.shape[1]}")
        return op.by_reference(coded_reference, x, packed, bias)
    return ROWS.product(x, packed.values, packed.bitmask, bias, packed.pattern, packed.shape[1])
