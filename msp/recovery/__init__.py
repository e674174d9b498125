"""Recovery: training after pruning that changes the kept values and leaves the storage as it is.

Each method is a file of its own. ``get_recovery`` finds a method by its name.
"""

from msp.recovery.base import RECOVERIES, Phase, Recovery, Task, get_recovery, register_recovery
from msp.recovery.blockwise import Blockwise
from msp.recovery.distil import Distil
from msp.recovery.loss import LossWeights, distillation_loss
from msp.recovery.norms import Norms

__all__ = [
    "RECOVERIES",
    "Blockwise",
    "Distil",
    "LossWeights",
    "Norms",
    "Phase",
    "Recovery",
    "Task",
    "distillation_loss",
    "get_recovery",
    "register_recovery",
]
