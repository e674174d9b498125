"""An allocator of your own: more weights for the blocks at both ends of the model.

python examples/own_allocator.py MODEL notes.txt
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import msp
from msp.allocators.base import Allocated, Problem, register_allocator


@register_allocator
@dataclass(frozen=True)
class BothEnds:
    """Density falls linearly from the ends of the model to its middle."""

    name: ClassVar[str] = "both-ends"

    def allocate(self, problem: Problem) -> Allocated:
        middle = max((problem.blocks - 1) / 2, 0.5)
        distances = [abs(unit.block - middle) / middle for unit in problem.units]
        return problem.from_densities([0.7 + 0.6 * distance for distance in distances])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate on")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration and test sets")
args = parser.parse_args()

sizes = {"calibration_tokens": args.tokens, "fitness_tokens": args.tokens, "test_tokens": args.tokens}
allocators = ["uniform", "ramp", "both-ends"]
for row in msp.compare(args.model, sparsity=0.6, allocators=allocators, seeds=[0], calibration=args.text, **sizes).rows:
    print(f"{row.allocator}, seed {row.seed}: KL {row.kl:.4f}")
