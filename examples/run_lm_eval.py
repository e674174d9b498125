"""Measure a packed model with lm-eval, on tasks of its own or on a text of yours. Needs the lm-eval extra.

python examples/run_lm_eval.py model-75 test.txt --tasks lambada_openai,hellaswag
"""

import argparse

from lm_eval import simple_evaluate

import msp  # noqa: F401  teaches transformers, and with it lm-eval, the packed format

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="directory of a packed or a dense model")
parser.add_argument("text", help="a text file, to measure its perplexity")
parser.add_argument("--tasks", default="", help="more tasks of lm-eval, which it downloads")
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

text_task = {
    "task": "text",
    "dataset_path": "text",
    "dataset_kwargs": {"data_files": {"test": args.text}, "sample_by": "document"},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
tasks = [text_task, *filter(None, args.tasks.split(","))]
result = simple_evaluate("hf", model_args=f"pretrained={args.model}", tasks=tasks, device=args.device)
for task, figures in result["results"].items():
    print(task, {name: value for name, value in figures.items() if isinstance(value, float)})
