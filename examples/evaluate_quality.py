"""Measure a packed model on a text, together with the dense model it was made from.

python examples/evaluate_quality.py model-75 test.txt --reference MODEL
"""

import argparse

from msp import evaluate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory of a packed or a dense model")
parser.add_argument("text", help="text that neither pruning nor the search has seen")
parser.add_argument("--reference", help="directory or hub id of the dense model")
parser.add_argument("--tokens", type=int, help="how much of the text; all of it by default")
args = parser.parse_args()

figures = evaluate(args.model, evaluate=args.text, reference=args.reference, test_tokens=args.tokens)
print(f"perplexity {figures.perplexity:.2f} on {figures.tokens} tokens in windows of {figures.window}")
if args.reference is not None:
    print(f"KL to the dense model {figures.kl:.4f} nats a token")
