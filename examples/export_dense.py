"""Write a packed model as a dense one, zeros included, for programs that cannot import msp.

python examples/export_dense.py model-75 model-75-dense
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

import msp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory of a packed model")
parser.add_argument("output", help="directory for the dense model")
args = parser.parse_args()

msp.export_dense(args.model, args.output)

packed = AutoModelForCausalLM.from_pretrained(args.model)
dense = AutoModelForCausalLM.from_pretrained(args.output)
tokens = torch.arange(10, 18).unsqueeze(0)
difference = (packed(tokens).logits - dense(tokens).logits).abs().max()
print(f"both models compute the same, up to {difference:.1e}")
