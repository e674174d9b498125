"""Train a pruned model until it predicts like the dense one again. Needs the recover extra.

python examples/recover.py model-75 path/to/model notes.txt model-75-recovered
"""

import argparse

import msp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory of a packed model")
parser.add_argument("teacher", help="directory or hub id of the dense model that it was pruned from")
parser.add_argument("text", help="text to train on")
parser.add_argument("output", help="directory for the recovered model, packed as before")
parser.add_argument("--method", default="distil", help="distil, blockwise or norms")
parser.add_argument("--tokens", default="2M", help="tokens to train on")
parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens for one step")
parser.add_argument("--held-out", type=int, default=16_384, help="tokens that judge the training, and test tokens")
parser.add_argument("--window", type=int, help="tokens of a training sequence")
args = parser.parse_args()

result = msp.recover(
    args.model,
    teacher=args.teacher,
    output=args.output,
    method=args.method,
    calibration=args.text,
    tokens=args.tokens,
    batch_tokens=args.batch_tokens,
    held_out_tokens=args.held_out,
    test_tokens=args.held_out,
    window=args.window,
)
for name, figures in (("held-out loss", result.held_out_loss), ("KL", result.kl), ("perplexity", result.perplexity)):
    print(f"{name} {figures['before']:.3f} -> {figures['after']:.3f}")
