"""What ops must return, in float64 and plain loops, and how far rounding may take them from it."""

from __future__ import annotations

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FINE = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def fisher_expected(acc, x, g):
    """The sum in float64, and the size that rounding errors of a float32 sum are proportional to."""
    total, size = acc.double(), acc.double()
    for s in range(x.shape[0]):
        total = total + torch.einsum("to,ti->oi", g[s].double(), x[s].double()) ** 2
        size = size + torch.einsum("to,ti->oi", g[s].double().abs(), x[s].double().abs()) ** 2
    return total, size


def assert_product(y, x, packed, bias):
    """Against float64: one rounding of the result, and what a float32 sum of K products may lose."""
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.T.abs() + (0 if bias is None else bias.double().abs())
    assert y.shape == expected.shape and y.dtype == x.dtype
    # the reference may round the product before it adds the bias
    bound = 2 * ROUNDING[x.dtype] * size + 16 * ROUNDING[torch.float32] * size + 1e-6
    assert ((y.double() - expected).abs() <= bound).all()


def sweep_inputs(rows, columns, dtype, seed, device=DEVICE):
    """A weight, and the inverse Hessian's factor of correlated inputs."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5 + torch.eye(columns)
    x = torch.randn(3 * columns, columns, dtype=torch.float64) @ mixing
    hessian = 2 * x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return torch.randn(rows, columns).to(device, dtype), factor.float().to(device)


def published(weight, factor, n, m, block):
    """SparseGPT's `fasterprune` in float64 with plain loops; returns the weight and what it kept."""
    w, u = weight.double().cpu().numpy().copy(), factor.double().cpu().numpy()
    rows, columns = w.shape
    kept = np.ones((rows, columns), dtype=bool)
    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        error = np.zeros((rows, i2 - i1))
        for i in range(i1, i2):
            if (i - i1) % m == 0:
                for r in range(rows):
                    saliency = [w[r, j] ** 2 / u[j, j] ** 2 for j in range(i, i + m)]
                    for j in np.argsort(saliency)[: m - n]:
                        kept[r, i + j] = False
            for r in range(rows):
                q = w[r, i] if kept[r, i] else 0.0
                error[r, i - i1] = (w[r, i] - q) / u[i, i]
                w[r, i + 1 : i2] -= error[r, i - i1] * u[i, i + 1 : i2]
                w[r, i] = q
        w[:, i2:] -= error @ u[i1:i2, i2:]
    return torch.from_numpy(w), torch.from_numpy(kept)
