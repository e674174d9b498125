"""Bad numbers: NaN, infinity and extreme values in models and in every option that takes a number.

Each ends in one line of error and the exit code for it, or in finite figures; never in a traceback, nor in a saved
model or an output with a figure that is not finite.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import torch
from families import build, save_text, tokenizer
from safetensors.torch import load_file

from msp.cli import app
from msp.cli.running import FAILED, WRONG_USAGE
from torture.harness import Report, Shares, command, kill, start, wait, workplace
from torture.kills import SEARCH, SMALL

SECONDS = 30
VALUES = [
    "nan", "NaN", "inf", "-inf", "Infinity", "-1", "-0", "0", "0.0", "1", "1.0", "2", "0.5", "0.75", "1e308",
    "-1e308", "1e309", "1e-308", "5e-324", "1e400", "1e999999999", "1e3", str(2**31), str(2**63), str(2**64),
    str(10**30), str(-(2**63)), "9" * 5000, "", " ", "x", "0x10", "1_000", "１２", "٣", "0.1.2", "1,2", "3/4", "1/0",
    "--5", "0.9999999999999999", "1e-9", "7 ", "true", "null", "[1]", "1GB", "-1GB", "nanGB", "infms", "-5ms",
    "1e400ms", "0ms", "1e-400ms", "999999999999TB",
]  # fmt: skip
# Options of numbers that are texts to the parser, each with how a value stands in it.
TEXTS = {
    "--budget-bytes": "{}", "--budget-decode": "{}", "--patterns": "{}:8", "--keep": "layers.0.*={}:8",
    "--search-options": "generations: {}", "--hidden-bytes": "{}", "--sparsity": "{}",
    "--ray-address": "127.0.0.1:{}",
}  # fmt: skip
CONSTANTS = [
    "generations",
    "offspring",
    "mutations",
    "survivors",
    "elite",
    "crossover_rate",
    "sensitivities",
    "patience",
]
# A huge one of these is a wish for endless work, and not wrong.
ENDLESS = {"--evaluations", "--search-tokens", "--seeds", "--max-new-tokens", "--search-options", "--workers"}
VERBS: dict[str, list[str]] = {
    "prune": ["prune", "model", "-o", "out", "--no-pictures", *SEARCH],
    "search": ["search", "model", "-o", "out", *SEARCH],
    "compare": ["compare", "model", "-o", "out.png", "--allocators", "uniform", "--seeds", "1", *SMALL],
    "sensitivity": ["sensitivity", "model", "-o", "out.png", "--calibration", "text.txt", "--window", "16", "--json"],
    "evaluate": ["evaluate", "model", "--evaluate", "text.txt", "--window", "16", "--json"],
    "generate": ["generate", "model", "w5 w6", "--max-new-tokens", "4", "--json"],
    "measure": ["measure", "model", "-o", "table.json", "--json"],
}
# Written over some entries of a tensor, or over all of it.
WEIGHTS = [
    math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, 5e-324, 1e-30, 1e4, 65504.0, 65520.0, 1e10, 1e18, 1e20, 3e38,
    -3e38, 1e-8,
]  # fmt: skip
PRUNERS = ["magnitude", "wanda", "ria", "fisher", "sparsegpt"]
ALLOCATORS = ["uniform", "ramp", "owl", "fisher-rank", "fisher-knapsack", "msp"]


def run(report: Report, seconds: float) -> None:
    draw = random.Random(f"{report.seed}/numbers")
    shares = Shares(seconds, 2)
    with workplace() as home:
        _save(home / "model", build("llama"))
        save_text(home / "text.txt", 7)
        options(report, home, shares.next(), draw)
        weights(report, home, shares.next(), draw)


def _save(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def numeric_options() -> dict[str, list[str]]:
    """Of every verb, the options that take a number, from the parser itself."""
    found: dict[str, list[str]] = {}
    for entry in app.registered_commands:
        assert entry.callback is not None
        name = entry.name or entry.callback.__name__
        if name in VERBS:
            hints = inspect.signature(entry.callback, eval_str=True).parameters.items()
            options = {f"--{key.replace('_', '-')}": _kinds(parameter.annotation) for key, parameter in hints}
            found[name] = [key for key, kinds in options.items() if kinds & {int, float} or key in TEXTS]
    return found


def _kinds(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    if not inner:
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*map(_kinds, inner))


def options(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    part = report.part("options", 600)
    every = [(verb, name, value) for verb, names in numeric_options().items() for name in names for value in VALUES]
    part.notes["there_are"] = len(every)
    draw.shuffle(every)
    # errors of the parser come in moments: an option that begins with work takes a second
    for verb, name, value in every[: part.asked]:
        if part.done and time.monotonic() > deadline:
            break
        text = TEXTS.get(name, "{}").format(value)
        if name == "--search-options":
            text = f"{draw.choice(CONSTANTS)}: {value}"
        asked = [
            *VERBS[verb],
            *(["--stream"] if name == "--hidden-bytes" and verb == "prune" else []),
            f"{name}={text}",
        ]
        if name == "--ray-address":
            asked += ["--workers=1"]
        verdict, why = judge(home, asked, endless=name in ENDLESS)
        _count(report, "options", verdict, why, arguments=" ".join(asked)[:900])


def weights(report: Report, home: Path, deadline: float, draw: random.Random) -> None:
    part = report.part("weights", 250)
    while part.goes_on(deadline):
        family = draw.choice(["llama", "qwen2", "gpt2"])
        dtype = draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
        model = build(family, draw.randrange(9)).to(dtype)
        names = list(model.state_dict())
        name, value = draw.choice(names), draw.choice(WEIGHTS)
        tensor = model.state_dict()[name]
        count = draw.choice([1, 3, tensor.numel()])
        with torch.no_grad():
            tensor.view(-1)[draw.randrange(max(1, tensor.numel() - count + 1)) :][:count] = value
        _save(home / "odd", model)
        verb = draw.choice(["prune", "prune", "prune", "evaluate", "sensitivity", "search"])
        asked = ["odd" if part == "model" else part for part in VERBS[verb]]
        if verb == "prune":
            asked += ["--pruner", draw.choice(PRUNERS), "--allocator", draw.choice(ALLOCATORS)]
            asked += ["--stream"] if draw.random() < 0.25 else []
        verdict, why = judge(home, asked)
        what = {"family": family, "dtype": str(dtype), "tensor": name, "value": value, "entries": count}
        _count(report, "weights", verdict, why, arguments=" ".join(asked), **what)
        shutil.rmtree(home / "odd")


def _count(report: Report, name: str, verdict: str, why: str, **again: Any) -> None:
    part = report.parts[name]
    part.done += 1
    if verdict in ("figures", "refused", "endless"):
        part.what[verdict] += 1
    else:
        report.fail(name, verdict, why, seed=report.seed, **again)


def judge(home: Path, arguments: list[str], *, endless: bool = False) -> tuple[str, str]:
    """Run a command, and say what it came to."""
    folder = home / "run"
    folder.mkdir()
    for link in home.iterdir():
        if link != folder:
            (folder / link.name).symlink_to(link)
    try:
        child = start(command(arguments, folder, TMPDIR=str(folder)), folder / "said")
        code = wait(child, SECONDS)
        if code is None:
            kill(child)
            return ("endless", "") if endless else ("hang", f"no end after {SECONDS} s")
        out, said = ((folder / f"said.{end}").read_text(errors="replace") for end in ("out", "err"))
        if code == 0:
            return figures(folder, out)
        return error(code, said)
    finally:
        shutil.rmtree(folder)


def error(code: int, said: str) -> tuple[str, str]:
    """Whether an error is one line of ours, or the parser's box."""
    if code not in (FAILED, WRONG_USAGE):
        return "crash", f"exit code {code}: {said}"
    if "Traceback" in said or "(run again with --debug" in said:
        return "traceback", said
    lines = [line for line in said.splitlines() if line.startswith("msp: ")]
    if code == WRONG_USAGE and "Usage: " in said:
        return "refused", ""
    return ("refused", "") if len(lines) == 1 and len(lines[0]) < 1000 else ("wrong", f"no one line of error: {said}")


def figures(folder: Path, out: str) -> tuple[str, str]:
    """Whether all figures are finite, in what is printed and in the model that is saved."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} in the output")

    try:
        found = json.loads(out, parse_constant=refuse)
    except ValueError as wrong:
        return "wrong", f"{wrong}: {out[:300]}"
    if bad := [name for name, value in _flat(found) if value in ("nan", "inf", "-inf", "Infinity", "NaN")]:
        return "wrong", f"{bad[:5]} are not finite: {out[:300]}"
    for name in ("perplexity", "kl"):
        if isinstance(found, dict) and name in found and found[name] is None and "reference" not in found:
            return "wrong", f"{name} is null: {out[:300]}"
    for file in folder.glob("out/*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return "wrong", f"{name} of the saved model is not finite"
    return "figures", ""


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [entry for key, item in value.items() for entry in _flat(item, f"{name}.{key}")]
    if isinstance(value, list):
        return [entry for item in value for entry in _flat(item, name)]
    return [(name, value)]
