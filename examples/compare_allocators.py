"""Compare ways to spend the same budget of weights on a model of yours.

python examples/compare_allocators.py MODEL notes.txt
"""

import argparse

import msp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate and to search on")
parser.add_argument("--allocators", default="uniform,ramp,owl,fisher-rank,msp", help="names with commas between")
parser.add_argument("--pruners", default="wanda", help="names with commas between")
parser.add_argument("--seeds", type=int, default=3, help="repetitions")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration, fitness and test sets")
parser.add_argument("--evaluations", type=int, help="candidates that each search measures")
args = parser.parse_args()

result = msp.compare(
    args.model,
    sparsity=0.75,
    allocators=args.allocators.split(","),
    pruners=args.pruners.split(","),
    seeds=range(args.seeds),
    calibration=args.text,
    calibration_tokens=args.tokens,
    fitness_tokens=args.tokens,
    test_tokens=args.tokens,
    evaluations=args.evaluations,
)
print(f"dense: perplexity {result.dense_perplexity:.1f}")
for row in result.rows:
    if row.seed == "mean":
        print(f"{row.allocator} with {row.pruner}: KL {row.kl:.3f}, perplexity {row.perplexity:.1f}")
