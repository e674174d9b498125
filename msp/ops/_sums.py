"""Sums whose order does not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

# torch divides a sum to a single number among its threads from 32768 numbers on, and the division changes the rounding.
SERIAL = 1 << 14


def ordered_sum(tensor: Tensor) -> Tensor:
    """The sum of all of ``tensor`` in float64, on its device: the same bits on any number of threads.

    Numbers of the last dimension are added up first, in float32, or in float64 if ``tensor`` is float64.
    """
    while tensor.ndim > 1:
        tensor = tensor.sum(-1)  # each thread adds up whole rows
    tensor = tensor.double()
    while tensor.numel() > SERIAL:
        tensor = torch.stack([part.sum() for part in torch.split(tensor, SERIAL)])
    return tensor.sum()
