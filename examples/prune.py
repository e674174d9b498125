"""Prune a model to 75 % sparsity, load the result with transformers, and let it write.

python examples/prune.py MODEL notes.txt model-75
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import msp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory or hub id of a dense model")
parser.add_argument("text", help="text to calibrate and to search on")
parser.add_argument("output", help="directory for the packed model")
parser.add_argument("--tokens", type=int, default=32_768, help="size of the calibration, fitness and test sets")
parser.add_argument("--evaluations", type=int, help="candidates that the search measures")
args = parser.parse_args()

result = msp.prune(
    args.model,
    sparsity=0.75,
    output=args.output,
    calibration=args.text,
    calibration_tokens=args.tokens,
    fitness_tokens=args.tokens,
    test_tokens=args.tokens,
    evaluations=args.evaluations,
)
print(f"density {result.density:.2%}, KL to the dense model {result.kl:.3f} nats a token")

model = AutoModelForCausalLM.from_pretrained(args.output)  # import msp has taught transformers the format
tokenizer = AutoTokenizer.from_pretrained(args.output)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
