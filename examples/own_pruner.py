"""A pruner of your own: Wanda with a choice of how much the inputs count.

python examples/own_pruner.py MODEL notes.txt
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import msp
from msp.pruners.base import KeepingPruner, LinearStatistics, Scoring, register_pruner


@register_pruner
@dataclass(frozen=True)
class SoftWanda(KeepingPruner):
    """Scores a weight by ``|w| * sqrt(||x||)``, where Wanda has ``|w| * ||x||``."""

    name: ClassVar[str] = "soft-wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"input_sum_squares"})

    def scoring(self, weight: Tensor, statistics: LinearStatistics) -> Scoring:
        sums = self.require(statistics, "input_sum_squares", weight.shape[1:])
        return Scoring(column_scale=sums**0.25)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate on")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration and test sets")
args = parser.parse_args()

sizes = {"calibration_tokens": args.tokens, "fitness_tokens": args.tokens, "test_tokens": args.tokens}
pruners = ["wanda", "soft-wanda"]
text = {"calibration": args.text, **sizes}
for row in msp.compare(args.model, sparsity=0.5, allocators=["uniform"], pruners=pruners, seeds=[0], **text).rows:
    print(f"{row.pruner}, seed {row.seed}: KL {row.kl:.4f}")
