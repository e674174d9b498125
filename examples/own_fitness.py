"""Let the search minimise a loss of your own: here that of the most difficult tokens alone.

python examples/own_fitness.py MODEL notes.txt
"""

import argparse

from torch import Tensor
from torch.nn.functional import cross_entropy

from msp import search


def difficult_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the losses above 4 nats: ``logits [B, T, V]`` predict ``tokens [B, T]``, each the next one."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses[losses > 4].sum()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate and to search on")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration, fitness and test sets")
parser.add_argument("--evaluations", type=int, help="candidates that the search measures")
args = parser.parse_args()

sizes = {"calibration_tokens": args.tokens, "fitness_tokens": args.tokens, "test_tokens": args.tokens}
found = search(
    args.model,
    sparsity=0.6,
    fitness=difficult_tokens,
    calibration=args.text,
    evaluations=args.evaluations,
    **sizes,
)
print(f"loss {found.loss:.4f} a token, after {found.history[-1]['evaluations']} candidates")
