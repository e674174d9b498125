"""The score of a weight, shared by ``nm_select`` and ``nm_rank``: what the arguments mean and their checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAGNITUDE, SCALED, RELATIVE, FISHER, EXPLICIT = range(5)


@dataclass(frozen=True)
class Terms:
    """The checked terms of a score, float32 and contiguous, and the number of its formula."""

    kind: int
    column_scale: Tensor | None = None
    row_term: Tensor | None = None
    column_term: Tensor | None = None
    matrix: Tensor | None = None


def check_terms(
    op: str,
    weight: Tensor,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    importance: Tensor | None,
    scores: Tensor | None,
) -> Terms:
    """Raise ``ValueError`` unless the arguments form one score of ``weight``'s shape and all is finite."""
    rows, columns = weight.shape
    vectors = [term is not None for term in (column_scale, row_term, column_term)]
    if (importance is not None) + (scores is not None) + any(vectors) > 1:
        raise ValueError(f"{op}: give vector terms, importance or scores, not several of them")
    if (row_term is None) != (column_term is None):
        raise ValueError(f"{op}: row_term and column_term go together")
    checked: dict[str, Tensor | None] = {}
    for name, term, shape in (
        ("column_scale", column_scale, (columns,)),
        ("row_term", row_term, (rows,)),
        ("column_term", column_term, (columns,)),
        ("importance", importance, (rows, columns)),
        ("scores", scores, (rows, columns)),
    ):
        if term is not None:
            if term.shape != shape:
                raise ValueError(f"{op}: {name} has shape {list(term.shape)}, needed is {list(shape)}")
            if term.device != weight.device:
                raise ValueError(f"{op}: {name} is on {term.device}, weight on {weight.device}")
            term = term.to(torch.float32).contiguous()
            _check_finite(op, name, term)
        checked[name] = term
    _check_finite(op, "weight", weight)
    kind = MAGNITUDE
    if row_term is not None:
        kind = RELATIVE
    elif column_scale is not None:
        kind = SCALED
    elif importance is not None:
        kind = FISHER
    elif scores is not None:
        kind = EXPLICIT
    matrix = checked["importance"] if importance is not None else checked["scores"]
    return Terms(kind, checked["column_scale"], checked["row_term"], checked["column_term"], matrix)


def score(
    weight: Tensor,
    kind: int,
    column_scale: Tensor | None,
    row_term: Tensor | None,
    column_term: Tensor | None,
    matrix: Tensor | None,
) -> Tensor:
    """fp32 ``[R, K]``: ``|w|``, ``|w| s_j`` (Wanda), ``|w| (r_i + c_j) s_j`` (RIA), ``w^2 F_ij``, or given."""
    if kind == EXPLICIT:
        assert matrix is not None
        return matrix
    exact = weight.float()
    if kind == FISHER:
        assert matrix is not None
        return exact * exact * matrix
    found = exact.abs()
    if kind == RELATIVE:
        assert row_term is not None and column_term is not None
        found = found * (row_term[:, None] + column_term)
    return found if column_scale is None else found * column_scale


def rank(scores: Tensor, group_size: int) -> Tensor:
    """uint8 ``[R, K]``: the rank of each score inside its group, 0 the highest, ties to the lower column."""
    rows, columns = scores.shape
    order = scores.reshape(rows, columns // group_size, group_size).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(group_size, dtype=torch.uint8, device=scores.device).expand_as(order)
    return torch.empty_like(places, memory_format=torch.contiguous_format).scatter_(-1, order, places).view(rows, columns)


def _check_finite(op: str, name: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = int(finite.numel() - finite.sum())
        raise ValueError(f"{op}: {bad} of the {finite.numel()} values of {name} are NaN or infinite")
