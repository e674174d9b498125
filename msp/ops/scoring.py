"""The ranking of weights inside a group: the score formulas, their checks and the reference ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msp.formats.packed_weight import VALUE_DTYPES, check_matrix

MAGNITUDE, SCALED, RELATIVE, FISHER, GIVEN = range(5)


class Terms(NamedTuple):
    """The terms of a score besides the weight; all fp32 and contiguous after the checks.

    ``column_scale [K]`` (s), ``row_term [R]`` (r), ``column_term [K]`` (c), ``importance [R, K]`` (F),
    ``scores [R, K]``. No term: magnitude.
    """

    column_scale: Tensor | None = None
    row_term: Tensor | None = None
    column_term: Tensor | None = None
    importance: Tensor | None = None
    scores: Tensor | None = None

    @property
    def kind(self) -> int:
        """The code of the formula for kernels: 0 magnitude, 1 scaled, 2 RIA, 3 Fisher, 4 given."""
        if self.scores is not None:
            return GIVEN
        if self.importance is not None:
            return FISHER
        if self.row_term is not None:
            return RELATIVE
        return MAGNITUDE if self.column_scale is None else SCALED

    @property
    def matrix(self) -> Tensor | None:
        """The ``[R, K]`` term, of which there is at most one."""
        return self.importance if self.scores is None else self.scores

    @property
    def for_kernels(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The terms in the order of kernels, which read ``importance`` and ``scores`` from one argument."""
        return self.column_scale, self.row_term, self.column_term, self.matrix


def score(weight: Tensor, terms: Terms) -> Tensor:
    """The fp32 scores ``[R, K]``; every backend multiplies in this order, so all agree to the bit."""
    if terms.scores is not None:
        return terms.scores
    weight = weight.float()
    if terms.importance is not None:
        return weight * weight * terms.importance
    result = weight.abs()
    if terms.row_term is not None and terms.column_term is not None:
        result = result * (terms.row_term[:, None] + terms.column_term)
    if terms.column_scale is not None:
        result = result * terms.column_scale
    return result


def rank_in_groups(scores: Tensor, group_size: int) -> Tensor:
    """uint8 ``[R, K]``: the number of better weights in the group; of equal weights, the lower column is better."""
    # the place in the group comes first, so that every comparison runs over contiguous memory
    places = scores.reshape(-1, group_size).t().contiguous()
    rank = torch.zeros_like(places, dtype=torch.uint8)
    for place, these in enumerate(places):
        rank[:place] += these > places[:place]
        rank[place + 1 :] += these >= places[place + 1 :]
    return rank.t().reshape(scores.shape)


def check_scoring(weight: Tensor, group_size: int, given: Terms) -> Terms:
    """The terms ``given`` in fp32, after every check that reads no value; ``check_finite`` has the others.

    Raises:
        TypeError: no weight or term can have this dtype.
        ValueError: a shape or device that does not fit, or terms that exclude each other.
    """
    check_matrix("weight", weight, group_size)
    rows, columns = weight.shape
    if given.kind == MAGNITUDE and given.column_term is None:
        return given
    shapes = ((columns,), (rows,), (columns,), (rows, columns), (rows, columns))
    named = []
    for name, term, shape in zip(Terms._fields, given, shapes, strict=True):
        if term is None:
            continue
        named.append(name)
        if not term.is_floating_point():
            raise TypeError(f"{name} is {term.dtype}, but must be a floating point tensor")
        if tuple(term.shape) != shape:
            raise ValueError(f"{name} has shape {list(term.shape)}, but must have {list(shape)}")
        if term.device != weight.device:
            raise ValueError(f"{name} is on {term.device}, but weight is on {weight.device}")
    if ("row_term" in named) != ("column_term" in named):
        raise ValueError(
            f"{named[0] if len(named) == 1 else ' and '.join(named)}: row_term and column_term go together"
        )
    for alone in ("importance", "scores"):
        if alone in named and len(named) > 1:
            others = ", ".join(name for name in named if name != alone)
            raise ValueError(f"{alone} excludes other terms, but {others} was given too")
    return Terms(*[None if term is None else term.detach().float().contiguous() for term in given])


def check_finite(weight: Tensor, terms: Terms) -> None:
    """The first step of a backend whose kernel does not count values that are not finite.

    One read of each tensor: its extremes show whether it, and the scores made of it, are finite.

    Raises:
        ValueError: NaN or infinite weights, terms or scores (with their number).
    """
    largest = {"weight": _largest("weight", weight)}
    for name, term in zip(Terms._fields, terms, strict=True):
        if term is not None:
            largest[name] = _largest(name, term)
    if terms.scores is not None:
        return
    # also of the products in between: infinity times zero is not zero
    product = bound = largest["weight"]
    if terms.importance is not None:
        product = largest["weight"] ** 2
        bound = max(product, product * largest["importance"])
    if terms.row_term is not None:
        product *= largest["row_term"] + largest["column_term"]
        bound = max(bound, product)
    if terms.column_scale is not None:
        bound = max(bound, product * largest["column_scale"])
    # the bound pairs extremes that may never meet, so only the scores themselves decide
    if bound > torch.finfo(torch.float32).max / 2:
        _require_finite("scores", score(weight, terms))


def check_counted(wrong: int, weight: Tensor, terms: Terms) -> None:
    """``check_finite`` after a kernel that has counted ``wrong`` weights or scores, so that none is read twice.

    Raises:
        ValueError: as ``check_finite``.
    """
    if wrong or not weight.numel():
        check_finite(weight, terms)
    if wrong:
        raise ValueError(f"scores: {wrong} of {weight.numel()} are NaN or infinite")


def scored_arguments(weight: Tensor, terms: Terms, group_size: int) -> dict[str, int]:
    """The arguments of compiled kernels for a contiguous weight and its terms, by name."""
    rows, columns = weight.shape
    names = ("column_scale_ptr", "row_term_ptr", "column_term_ptr", "matrix_ptr")
    return {
        "weight_ptr": weight.data_ptr(),
        "dtype_code": VALUE_DTYPES.index(weight.dtype),
        "rows": rows,
        "columns": columns,
        "group_size": group_size,
        "score_kind": terms.kind,
        **{name: 0 if term is None else term.data_ptr() for name, term in zip(names, terms.for_kernels, strict=True)},
    }


def _largest(name: str, tensor: Tensor) -> float:
    """The largest absolute value; NaN and infinity propagate through the extremes."""
    if tensor.numel() == 0:
        return 0.0
    low, high = (float(extreme) for extreme in torch.aminmax(tensor.detach()))
    if not abs(low) + abs(high) < float("inf"):
        _require_finite(name, tensor)
    return max(abs(low), abs(high))


def _require_finite(name: str, tensor: Tensor) -> None:
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise ValueError(f"{name}: {wrong} of {tensor.numel()} are NaN or infinite")
