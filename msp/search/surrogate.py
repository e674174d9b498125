"""Predicts what candidates will measure from those that were measured: it costs no forward, so it can look at many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from msp.patterns import Unit
from msp.search.fitness import Key

Matrix = NDArray[np.float64]

# Of the ridge, relative to the mean square of the features; the best by leave-one-out error is taken.
RIDGES = tuple(10.0**power for power in range(-5, 2))


class Surrogate:
    """Ridge regression of the logarithm of the loss on what units keep.

    Features of a candidate: the density of every unit and its square, and the mean density of every block and of
    every kind of linear, by which units that were seldom changed learn from their like. Stages measure on different
    tokens and so differ by a constant, which is fitted too.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        densities = [[float(pattern.density) for pattern in unit.patterns] for unit in units]
        top = max(len(levels) for levels in densities)
        self._densities = np.array([levels + [0.0] * (top - len(levels)) for levels in densities])
        groups = [np.array([unit.block for unit in units]), np.array([unit.kind for unit in units])]
        weights = np.array([unit.weights for unit in units], dtype=np.float64)
        means = [np.where(labels == label, weights, 0.0) for labels in groups for label in np.unique(labels)]
        self._means = np.array([row / row.sum() for row in means]).T
        self._center = np.zeros(0)
        self._coefficients = np.zeros(0)

    def fit(self, measured: Mapping[tuple[int, Key], float]) -> bool:
        """Fit to the losses by (stage, candidate); False where there are too few finite ones."""
        rows = [(stage, key, loss) for (stage, key), loss in measured.items() if 0 < loss < np.inf]
        if len(rows) < 2:
            return False
        stages, keys, losses = zip(*rows, strict=True)
        features, target = self._features(keys), np.log(np.array(losses))
        # A constant for each stage: centred stage by stage, the constants drop out.
        which = np.array(stages)
        for stage in np.unique(which):
            of_stage = which == stage
            target[of_stage] -= target[of_stage].mean()
            features[of_stage] -= features[of_stage].mean(0)
        left, singular, right = np.linalg.svd(features, full_matrices=False)
        projected = left.T @ target
        errors = []
        scale = float((singular**2).mean()) or 1.0
        for ridge in RIDGES:
            shrink = singular**2 / (singular**2 + ridge * scale)
            hat = (left**2 * shrink).sum(1)
            residual = (target - left @ (shrink * projected)) / np.maximum(1 - hat, 1e-6)
            errors.append(float((residual**2).sum()))
        ridge = RIDGES[int(np.argmin(errors))] * scale
        self._coefficients = right.T @ (singular / (singular**2 + ridge) * projected)
        return True

    def predict(self, keys: Sequence[Key]) -> Matrix:
        """Log losses, up to a constant; lower is better."""
        predicted: Matrix = self._features(keys) @ self._coefficients
        return predicted

    def _features(self, keys: Sequence[Key]) -> Matrix:
        levels = np.array(keys)
        kept = self._densities[np.arange(levels.shape[1]), levels]
        return np.concatenate([kept, kept**2, kept @ self._means], axis=1)
