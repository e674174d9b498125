"""Allocators decide how many of every M weights each unit keeps."""

from msp.allocators.base import (
    Allocated,
    Allocator,
    Evidence,
    Problem,
    SearchSettings,
    allocator_names,
    get_allocator,
    register_allocator,
)
from msp.allocators.evolution import Msp, MspRandom
from msp.allocators.fisher_knapsack import FisherKnapsack
from msp.allocators.fisher_rank import FisherRank, FisherRankLinear
from msp.allocators.owl import Owl
from msp.allocators.ramp import Ramp
from msp.allocators.uniform import Uniform

__all__ = [
    "Allocated",
    "Allocator",
    "Evidence",
    "FisherKnapsack",
    "FisherRank",
    "FisherRankLinear",
    "Msp",
    "MspRandom",
    "Owl",
    "Problem",
    "Ramp",
    "SearchSettings",
    "Uniform",
    "allocator_names",
    "get_allocator",
    "register_allocator",
]
