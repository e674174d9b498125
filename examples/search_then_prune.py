"""Search for an allocation now, and prune to it later, by another pruner if you like.

python examples/search_then_prune.py MODEL notes.txt found model-75
"""

import argparse
from pathlib import Path

import msp
from msp import search

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate and to search on")
parser.add_argument("found", type=Path, help="directory for allocation.json and recipe.yaml")
parser.add_argument("output", help="directory for the packed model")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration, fitness and test sets")
parser.add_argument("--evaluations", type=int, help="candidates that the search measures")
args = parser.parse_args()

sizes = {"calibration_tokens": args.tokens, "fitness_tokens": args.tokens, "test_tokens": args.tokens}
found = search(
    args.model,
    sparsity=0.75,
    output=args.found,
    calibration=args.text,
    evaluations=args.evaluations,
    **sizes,
)
for name, pattern in list(found.allocation.items())[:5]:
    print(f"{name}: {pattern}")

recipe = args.found / "recipe.yaml"  # for people to read and edit; allocation.json has the same for programs
result = msp.prune(args.model, allocation=recipe, output=args.output, calibration=args.text, **sizes)
print(f"density {result.density:.2%}, KL to the dense model {result.kl:.3f} nats a token")
