"""Prune a model that does not fit in memory: one block at a time is loaded, pruned and written.

python examples/stream_large_model.py MODEL notes.txt model-75
"""

import argparse

import msp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate on")
parser.add_argument("output", help="directory for the packed model")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration, fitness and test sets")
parser.add_argument("--hidden-bytes", default="4GB", help="memory for the hidden states of the tokens")
args = parser.parse_args()

result = msp.prune(
    args.model,
    sparsity=0.75,
    allocator="fisher-rank",  # msp searches streamed, too, and reads every block again and again for it
    stream=True,
    hidden_bytes=args.hidden_bytes,
    output=args.output,
    calibration=args.text,
    calibration_tokens=args.tokens,
    fitness_tokens=args.tokens,
    test_tokens=args.tokens,
)
print(f"KL {result.kl:.3f}; at most {result.peak_memory / 1e9:.2f} GB of memory were used")
