"""Search for several budgets at once, and draw the loss at each of them.

python examples/pareto_curve.py MODEL notes.txt curve
"""

import argparse

import msp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate and to search on")
parser.add_argument("output", help="directory for an allocation of each budget, pareto.json and pareto.png")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration, fitness and test sets")
parser.add_argument("--evaluations", type=int, help="candidates that each search measures")
args = parser.parse_args()

curve = msp.pareto(
    args.model,
    sparsities=[0.5, 0.6, 0.75],  # or budgets_bytes=["300MB", "200MB"]
    output=args.output,
    calibration=args.text,
    calibration_tokens=args.tokens,
    fitness_tokens=args.tokens,
    test_tokens=args.tokens,
    evaluations=args.evaluations,
)
for name, result in curve.results.items():
    print(f"sparsity {name}: KL {result.loss:.3f} on the fitness tokens, {result.bytes['packed'] / 1e6:.1f} MB")
