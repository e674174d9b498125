"""N:M selection done one group at a time with Python's sort: what every backend must agree with to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msp.ops import available_backends

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def need(op, backend, device):
    """Skip a test whose backend cannot run here."""
    if backend not in available_backends(op):
        pytest.skip(f"{op} has no {backend} here")
    if backend in ("cpu", "cuda") and device.type != backend:
        pytest.skip(f"{backend} does not serve {device}")


def order(scores, first, m):
    """Columns of one group of a row of scores, best first; of equals the lower column."""
    return sorted(range(first, first + m), key=lambda column: (-scores[column], column))


def kept(scores, n, m, compliant=False):
    """Bool ``[R, K]``: walk every group best first; a compliant walk skips what is third in its four."""
    mask = np.zeros(scores.shape, dtype=bool)
    for row, line in enumerate(scores):
        for first in range(0, len(line), m):
            quads = {}
            for column in order(line, first, m):
                taken = mask[row, first : first + m].sum()
                if taken < n and not (compliant and quads.get(column // 4, 0) == 2):
                    mask[row, column] = True
                    quads[column // 4] = quads.get(column // 4, 0) + 1
    return mask


def ranks(scores, m):
    result = np.zeros(scores.shape, dtype=np.uint8)
    for row, line in enumerate(scores):
        for first in range(0, len(line), m):
            for rank, column in enumerate(order(line, first, m)):
                result[row, column] = rank
    return result


def packed(weight, mask):
    """The values and the bitmask of section 4 of the design, bit by bit."""
    rows, columns = mask.shape
    bitmask = np.zeros((rows, -(-columns // 8)), dtype=np.uint8)
    for row, column in zip(*mask.nonzero(), strict=True):
        bitmask[row, column // 8] |= 1 << (column % 8)
    values = [[float(weight[row, column]) for column in np.flatnonzero(mask[row])] for row in range(rows)]
    return torch.tensor(values).reshape(rows, -1).to(weight.dtype), torch.from_numpy(bitmask)


def weights(rows, columns, dtype, generator):
    """Normal weights of which many are equal in size, and some zero with either sign."""
    weight = torch.randn(rows, columns, generator=generator)
    coarse = torch.rand(rows, columns, generator=generator) < 0.5
    return torch.where(coarse, (weight * 2).round() / 2, weight).to(dtype)


def terms(kind, rows, columns, generator):
    """The arguments that make the score ``kind``, with ties in them."""

    def positive(*shape):
        return (torch.rand(*shape, generator=generator) * 4).round() / 4 + 0.25

    return {
        "magnitude": {},
        "wanda": {"column_scale": positive(columns)},
        "ria": {
            "row_term": positive(rows),
            "column_term": positive(columns),
            "column_scale": positive(columns),
        },
        "ria without activations": {"row_term": positive(rows), "column_term": positive(columns)},
        "fisher": {"importance": positive(rows, columns)},
        "given": {"scores": (torch.randn(rows, columns, generator=generator) * 2).round()},
    }[kind]


KINDS = ["magnitude", "wanda", "ria", "ria without activations", "fisher", "given"]


def scores(weight, *, column_scale=None, row_term=None, column_term=None, importance=None, scores=None):
    """The formulas in numpy's float32."""
    w = weight.float().cpu().numpy()
    s, r, c, f, given = (
        None if term is None else term.float().cpu().numpy()
        for term in (column_scale, row_term, column_term, importance, scores)
    )
    if given is not None:
        return given
    if f is not None:
        return w * w * f
    result = np.abs(w)
    if r is not None:
        result = result * (r[:, None] + c[None, :])
    return result if s is None else result * s[None, :]


def to(device, arguments):
    return {name: tensor.to(device) for name, tensor in arguments.items()}
