"""Allocators decide how many of every M weights each unit keeps."""

from msp.allocators.base import (
    Allocated,
    Allocator,
    Evidence,
    Problem,
    SearchSettings,
    allocate,
    allocator_names,
    get_allocator,
    register_allocator,
)
from msp.allocators.controls import EvoPress, MspPaper, MspRandom, RampBest
from msp.allocators.evolution import Msp
from msp.allocators.fisher_knapsack import FisherKnapsack
from msp.allocators.fisher_rank import FisherRank, FisherRankLinear
from msp.allocators.owl import Owl
from msp.allocators.ramp import Ramp
from msp.allocators.uniform import Uniform

__all__ = [
    "Allocated",
    "Allocator",
    "Evidence",
    "EvoPress",
    "FisherKnapsack",
    "FisherRank",
    "FisherRankLinear",
    "Msp",
    "MspPaper",
    "MspRandom",
    "Owl",
    "Problem",
    "Ramp",
    "RampBest",
    "SearchSettings",
    "Uniform",
    "allocate",
    "allocator_names",
    "get_allocator",
    "register_allocator",
]
