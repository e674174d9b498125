"""Train a LoRA adapter on a packed model, and merge it under the mask. Needs the peft extra.

python examples/train_lora.py model-75 notes.txt model-75-tuned
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import msp  # noqa: F401  teaches transformers and peft the packed format

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory of a packed model")
parser.add_argument("text", type=Path, help="text to train on")
parser.add_argument("output", help="directory for the merged model, packed as before")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--window", type=int, default=256, help="tokens of a training sequence")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokens = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
model = AutoModelForCausalLM.from_pretrained(args.model)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
for step in range(args.steps):
    starts = torch.randint(0, len(tokens) - args.window, (4, 1))
    batch = tokens[starts + torch.arange(args.window)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

# An adapter is dense; the mask removes its values at empty places, so measure the merged model again.
model.merge_and_unload().save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
