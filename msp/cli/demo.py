"""``python -m msp.cli.demo``: trains a small model on this machine, prunes it two ways, compares, and generates.

Nothing is downloaded: the text is the source of the Python standard library, and the model is a byte-level Llama.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from msp.base.files import write_text
from msp.base.outputs import new_folder, reserved, working_folder
from msp.base.progress import NoProgress, Progress
from msp.base.readable import duration, number, size
from msp.errors import MspError
from msp.show.report import RichProgress

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "lib2to3",
}
# One file in this many is held out of training, for calibration and test.
HELD_OUT_EVERY = 8
PROMPT = "def read_lines(path):"
# The folders of the two pruned models in the output.
FOLDERS = ("uniform", "msp")


@dataclass(frozen=True)
class DemoSettings:
    """Everything that the trained model depends on; after a change the model is trained anew."""

    hidden: int = 96
    feed_forward: int = 320
    blocks: int = 8
    heads: int = 4
    context: int = 128
    batch: int = 16
    steps: int = 480
    warmup: int = 30
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    corpus_bytes: int = 12_000_000
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Documents by use: training, and two sets that the training never reads."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def digest(self) -> str:
        texts = "\0".join("\0".join(part) for part in (self.train, self.calibration, self.test))
        return hashlib.sha256(texts.encode()).hexdigest()


def standard_library(limit: int, root: Path | None = None) -> Corpus:
    """The sources of the standard library, in the order of their paths, up to ``limit`` bytes.

    Raises:
        MspError: this Python comes without sources.
    """
    root = root if root is not None else Path(os.__file__).parent
    paths = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    documents, total = [], 0
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        total += len(text.encode())
        if total > limit:
            break
        if text.strip():
            documents.append(text)
    held = documents[::HELD_OUT_EVERY]
    if len(held) < 2:
        raise MspError(f"no Python sources to learn from in {root}")
    train = tuple(text for index, text in enumerate(documents) if index % HELD_OUT_EVERY)
    return Corpus(train, tuple(held[0::2]), tuple(held[1::2]))


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """One token per byte, numbered as the byte, then the special tokens; a text starts with BOS."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # The letters of byte-level tokenizers for bytes, as GPT-2 chose them.
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    special = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=special
    )
    factory: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = factory(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=context
    )
    return wrapped


class Muon:
    """Momentum whose matrix updates are orthogonalised by Newton-Schulz iteration (Jordan et al., 2024).

    On so few tokens it learns far more than AdamW. Matrices of one shape share one iteration.
    """

    def __init__(self, matrices: Sequence[Tensor], momentum: float = 0.95, decay: float = 0.1) -> None:
        self._momentum, self._decay = momentum, decay
        self._averages = {weight: torch.zeros_like(weight) for weight in matrices}
        self._by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in matrices:
            self._by_shape.setdefault(weight.shape, []).append(weight)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix from its ``.grad``, and clear the gradient."""
        for shape, weights in self._by_shape.items():
            updates = _orthogonal(torch.stack([self._direction(weight) for weight in weights]))
            scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - rate * self._decay).sub_(update, alpha=scale)
                weight.grad = None

    def _direction(self, weight: Tensor) -> Tensor:
        assert weight.grad is not None
        average = self._averages[weight].lerp_(weight.grad, 1 - self._momentum)
        return weight.grad.lerp(average, self._momentum)


def _orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately ``U V^T`` of each of ``[B, R, K]`` matrices ``U S V^T``."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x: Tensor = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(steps):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, b * square + c * torch.bmm(square, square), x, beta=a)
    return x if wide is matrices else x.mT


def train(settings: DemoSettings, corpus: Corpus, folder: Path, progress: Progress | None = None) -> Path:
    """A trained model in ``folder``, read from there if an earlier run with the same settings and text stored it."""
    recipe = json.dumps({**asdict(settings), "corpus": corpus.digest, "format": 1}, sort_keys=True)
    target = folder / f"model-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    tokenizer = byte_tokenizer(settings.context)
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.feed_forward,
            num_hidden_layers=settings.blocks,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    bos = tokenizer.bos_token_id
    tokens = torch.cat([torch.tensor([bos, *text.encode()]) for text in corpus.train])
    with (progress or NoProgress()).stage("Training a small model", settings.steps) as advance:
        for step, loss in _training(model, tokens, settings):
            advance(step, loss=loss, perplexity_per_byte=math.exp(loss))
    with new_folder(target) as (partial, _):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target


def _training(model: LlamaForCausalLM, tokens: Tensor, settings: DemoSettings) -> Iterator[tuple[int, float]]:
    """Train in place for a fixed number of steps; yields ``(steps done, recent mean loss)``."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    offsets = torch.arange(settings.context)
    recent: float | None = None
    for step in range(settings.steps):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        factor = min(1.0, (step + 1) / settings.warmup) * decay
        starts = torch.randint(0, len(tokens) - settings.context, (settings.batch, 1), generator=generator)
        batch = tokens[starts + offsets]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(settings.matrix_rate * factor)
        adam.param_groups[0]["lr"] = settings.other_rate * factor
        adam.step()
        adam.zero_grad()
        recent = loss.item() if recent is None else 0.95 * recent + 0.05 * loss.item()
        yield step + 1, recent


@dataclass(frozen=True)
class Effort:
    """The effort of the pruning part."""

    calibration_tokens: int = 32_768
    fitness_tokens: int = 16_384
    test_tokens: int = 65_536
    evaluations: int = 160
    timed_tokens: int = 96
    timed_runs: int = 3


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; ``kl`` in nats a token, ``disk`` in bytes of tensors."""

    label: str
    density: float
    kl: float
    perplexity: float
    disk: int
    tokens_per_second: float


def run(
    settings: DemoSettings,
    effort: Effort,
    *,
    output: Path,
    cache: Path,
    progress: Progress,
    corpus: Corpus | None = None,
) -> tuple[list[Row], str]:
    """Train or read the model, prune it twice into ``output``, load both back; returns the table and a sample."""
    from msp import prune
    from msp.show.pictures import prune_pictures

    corpus = corpus if corpus is not None else standard_library(settings.corpus_bytes)
    with ExitStack() as stack:
        stack.enter_context(working_folder(cache))
        for folder in FOLDERS:
            stack.enter_context(reserved(output / folder, force=True))
        dense = train(settings, corpus, cache, progress)
        texts = {}
        for name, documents in (("calibration", corpus.calibration), ("test", corpus.test)):
            texts[name] = str(cache / f"{name}.jsonl")
            write_text(texts[name], "".join(json.dumps({"text": text}) + "\n" for text in documents))
        rows: list[Row] = []
        for label, allocator, folder in (("uniform 2:8", "uniform", FOLDERS[0]), ("MSP, mixed N:8", "msp", FOLDERS[1])):
            result = prune(
                str(dense),
                sparsity=0.75,
                output=output / folder,
                force=True,
                allocator=allocator,
                calibration=texts["calibration"],
                evaluate=texts["test"],
                window=settings.context,
                calibration_tokens=effort.calibration_tokens,
                fitness_tokens=effort.fitness_tokens,
                test_tokens=effort.test_tokens,
                evaluations=effort.evaluations,
                progress=progress,
            )
            if not rows:
                speed, _ = _timed(dense, effort)
                rows.append(Row("dense", 1.0, 0.0, result.perplexity["dense"], _disk(dense), speed))
            with progress.stage(f"Loading {folder} back and generating"):
                speed, sample = _timed(output / folder, effort)
            pruned = result.perplexity["pruned"]
            rows.append(Row(label, result.density, result.kl, pruned, _disk(output / folder), speed))
            prune_pictures(result, output / folder / "pictures")
    return rows, sample


def _timed(path: Path, effort: Effort) -> tuple[float, str]:
    """Median decoding speed in tokens/s of the model at ``path``, as plain transformers loads it, and its text."""
    from msp.verbs.generate import continue_text

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model.generation_config.eos_token_id = None  # every run generates the same number of tokens
    runs = [
        continue_text(model, tokenizer, PROMPT, max_new_tokens=effort.timed_tokens, temperature=0.6)
        for _ in range(effort.timed_runs)
    ]
    return statistics.median(completion.tokens_per_second for completion in runs), PROMPT + runs[0].text


def _disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def table(rows: list[Row]) -> Table:
    """The demo's result, the dense model first."""
    shown = Table(title="75 % of the weights removed", title_justify="left", title_style="bold")
    for column in ("", "Density", "KL", "Perplexity", "Bytes on disk", "Smaller", "Decode tokens/s"):
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        shown.add_row(
            Text(row.label),
            f"{row.density:.2%}",
            number(row.kl),
            number(row.perplexity),
            size(row.disk),
            f"{rows[0].disk / row.disk:.2f}x",
            f"{row.tokens_per_second:.0f}",
        )
    return shown


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns 0 if it is done, 1 if it failed or was interrupted, 128 and its number after a signal."""
    parser = argparse.ArgumentParser(prog="python -m msp.cli.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the pruned models go")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="where the trained model is kept")
    parser.add_argument("--steps", type=int, default=DemoSettings.steps, help="training steps")
    parser.add_argument("--evaluations", type=int, default=Effort.evaluations, help="candidates the search measures")
    given = parser.parse_args(arguments)
    from msp.cli.running import Stopped, calm_libraries, stopped_by_signals
    from msp.ops import last_backend

    calm_libraries()
    console, errors = Console(), Console(stderr=True)
    start = time.perf_counter()
    try:
        with stopped_by_signals(), RichProgress(errors) as progress:
            rows, sample = run(
                replace(DemoSettings(), steps=given.steps),
                replace(Effort(), evaluations=given.evaluations),
                output=given.output,
                cache=given.cache,
                progress=progress,
            )
    except KeyboardInterrupt as interrupt:
        errors.print("interrupted; what was trained to the end is kept, run the demo again to go on")
        return 128 + interrupt.number if isinstance(interrupt, Stopped) else 1
    except MspError as error:
        errors.print(Text(f"msp: {error}"))
        return 1
    console.print(table(rows))
    console.print(
        "KL (to the dense model, in nats) and perplexity are per byte, on files that neither training nor search has "
        f"seen. Packed linears were decoded by backend {last_backend('nm_linear')!r}. A model this small decodes at "
        "the speed of Python calls, packed or not; docs/cpu.md has the speed of one with a billion parameters.",
        style="dim",
        highlight=False,
    )
    console.print("\nThe MSP model, loaded back with plain transformers, goes on from a prompt:", style="bold")
    console.print(Text(sample))
    target = given.output / "msp"
    console.print(
        f"\nModel: {target}    Pictures: {target / 'pictures'}    Took {duration(time.perf_counter() - start)}"
    )
    console.print(f'Next: msp info {target}    or    msp generate {target} "import "', style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
