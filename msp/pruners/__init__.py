"""Pruners: which weights of a linear stay. Importing this package registers the built-in ones."""

from msp.pruners.base import (
    BasePruner,
    KeepingPruner,
    LinearStatistics,
    Pruner,
    Scoring,
    get_pruner,
    pruner_names,
    register_pruner,
)
from msp.pruners.fisher import FisherPruner
from msp.pruners.magnitude import MagnitudePruner
from msp.pruners.ria import RIAPruner
from msp.pruners.sparsegpt import SparseGPTPruner
from msp.pruners.wanda import WandaPruner

__all__ = [
    "BasePruner",
    "FisherPruner",
    "KeepingPruner",
    "LinearStatistics",
    "MagnitudePruner",
    "Pruner",
    "RIAPruner",
    "Scoring",
    "SparseGPTPruner",
    "WandaPruner",
    "get_pruner",
    "pruner_names",
    "register_pruner",
]
