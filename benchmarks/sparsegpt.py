"""SparseGPT's loop over columns as it is published and run: the peer of ``obs_prune``, and its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from msp.ops.obs_prune import reference

BLOCK = 128


def published(weight: Tensor, factor: Tensor, n: int, m: int) -> Tensor:
    """Algorithm 1 of arXiv 2301.00774 with N:M selection, in the steps of its authors' ``fasterprune``."""
    w = weight.clone()
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        block, u = w[:, start:stop].clone(), factor[start:stop, start:stop]
        pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
        mask = torch.zeros_like(block, dtype=torch.bool)
        for i in range(stop - start):
            column, diagonal = block[:, i], u[i, i]
            if i % m == 0:
                score = block[:, i : i + m] ** 2 / torch.diag(u)[i : i + m].reshape(1, -1) ** 2
                mask.scatter_(1, i + torch.topk(score, m - n, dim=1, largest=False)[1], True)
            q = column.clone()
            q[mask[:, i]] = 0
            pruned[:, i] = q
            error = (column - q) / diagonal
            block[:, i:] -= error.unsqueeze(1).matmul(u[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, start:stop] = pruned
        w[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return w


def make(size: int) -> tuple[Tensor, Tensor]:
    """A weight, and the factor of an inverse Hessian of correlated inputs."""
    torch.manual_seed(size)
    x = torch.randn(2 * size, size) @ (torch.eye(size) + torch.randn(size, size) / size**0.5)
    hessian = (x.T @ x).double() / size
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(size)
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(size, dtype=torch.float64), upper=False)
    return torch.randn(size, size), inverse.flip(0, 1).float().contiguous()


def error_where_the_choice_agrees(
    updated: Tensor, kept: Tensor, weight: Tensor, factor: Tensor, n: int, m: int
) -> float:
    """The error of the updated weights against a sweep in float64 with the same selection."""
    agree = (kept == reference(weight, factor, n, m, BLOCK)[1]).view(len(weight), -1, m).all(-1)
    assert agree.double().mean() > 0.99, "another choice than the reference's in more than the closest cases"
    w, u = weight.double().t().contiguous(), factor.double()
    chosen = kept.t().contiguous()
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            errors[i - start] = torch.where(chosen[i], 0.0, w[i]) / u[i, i]
            w[i + 1 : stop].addr_(u[i, i + 1 : stop], errors[i - start], alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].t(), errors, alpha=-1)
    want = w.masked_fill_(~chosen, 0.0).t()
    return float((updated.double() - want).norm() / want.norm())
