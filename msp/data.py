"""Token sets: where tokens come from, and how one text is split into calibration, fitness and test."""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from msp.errors import MspError, UsageError

# What the literature calibrates on, and the text most published perplexities are of.
DEFAULT_CALIBRATION = "hub:allenai/c4:en:train:text"
DEFAULT_EVALUATION = "hub-joined:Salesforce/wikitext:wikitext-2-raw-v1:test:text"

SOURCE_FORMS = (
    "text.txt, records.jsonl:FIELD, tokens.safetensors, hub:DATASET[:CONFIG]:SPLIT:COLUMN "
    "or hub-joined:DATASET[:CONFIG]:SPLIT:COLUMN"
)

# A seed draws its windows from this many times the tokens it needs, so that seeds differ and a huge
# source is still read only at its beginning.
POOL_FACTOR = 8

_INTEGERS = {"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64"}
_CHUNK_BYTES = 1 << 20
_CHARACTERS_PER_TOKEN = 5
# The last tokens of a text that was cut short may differ from those of the whole text.
_CUT_MARGIN = 64


@dataclass(frozen=True)
class TokenSource:
    """A place to read tokens from.

    ``spec`` is one of

    - ``text.txt`` (any other suffix too): tokenised as ONE string with the tokenizer's own special
      tokens once, the way perplexities are published;
    - ``records.jsonl:FIELD`` (``text`` when left out): each record a document, tokenised by itself
      and preceded by the tokenizer's BOS, or else its EOS, where it has one;
    - ``tokens.safetensors``: exactly one integer tensor, read in row order;
    - ``hub:DATASET[:CONFIG]:SPLIT:COLUMN``: each row of a hub data set a document, as for JSON lines;
    - ``hub-joined:DATASET[:CONFIG]:SPLIT:COLUMN``: the rows joined by blank lines into one text.
    """

    spec: str
    kind: Literal["text", "jsonl", "tokens", "hub", "hub-joined"]
    location: str
    column: str = "text"
    config: str | None = None
    split: str = ""

    @classmethod
    def parse(cls, spec: str) -> TokenSource:
        """Read a source's description; nothing is opened.

        Raises:
            UsageError: a form that is not one of the above.
        """
        for kind in ("hub", "hub-joined"):
            if spec.startswith(kind + ":"):
                parts = spec.split(":")[1:]
                if len(parts) not in (3, 4) or not all(parts):
                    raise UsageError(f"source {spec!r} is not of the form {kind}:DATASET[:CONFIG]:SPLIT:COLUMN")
                config = parts[1] if len(parts) == 4 else None
                return cls(spec, kind, parts[0], column=parts[-1], config=config, split=parts[-2])
        path, colon, field = spec.rpartition(".jsonl:")
        if colon:
            if not field or not path:
                raise UsageError(f"source {spec!r} names no field: write records.jsonl:FIELD")
            return cls(spec, "jsonl", path + ".jsonl", column=field)
        if not spec.strip():
            raise UsageError(f"an empty source; write {SOURCE_FORMS}")
        suffix = Path(spec).suffix
        return cls(spec, "jsonl" if suffix == ".jsonl" else "tokens" if suffix == ".safetensors" else "text", spec)

    def check(self) -> TokenSource:
        """What can be known without a tokenizer: that the file is there and not empty, the library installed.

        Raises:
            MspError: naming the file, or the extra to install.
        """
        if self.kind in ("hub", "hub-joined"):
            if importlib.util.find_spec("datasets") is None:
                raise MspError(
                    f"{self.spec} is a hub data set, which needs the datasets library: "
                    "pip install 'mixed-sparsity-pruning[hub]'"
                )
            return self
        path = Path(self.location)
        if not path.exists():
            raise MspError(f"{self.location}: no such file (a source is {SOURCE_FORMS})")
        if not path.is_file():
            raise MspError(f"{self.location} is a directory, not a file of text or tokens")
        if path.stat().st_size == 0:
            raise MspError(f"{self.location} is empty")
        return self

    def read(self, tokenizer: Any, vocab_size: int, limit: int | None = None) -> torch.Tensor:
        """The first ``limit`` tokens (all of them without it), int64 ``[tokens]``.

        Args:
            tokenizer: a Hugging Face tokenizer; ``None`` will do for saved tokens.
            vocab_size: rows of the model's embedding, which no token may reach.
            limit: reading stops soon after this many tokens.

        Raises:
            MspError: a missing, empty or undecodable file, a record without the field, no tokenizer, a
                token outside the vocabulary; the message names the file and the place in it.
        """
        self.check()
        if self.kind == "tokens":
            tokens = _read_saved(self.location, limit)
        elif tokenizer is None:
            raise MspError(f"the model has no tokenizer to read {self.spec} with: give saved tokens (.safetensors)")
        elif self.kind == "text":
            tokens = _tokenise_text(_file_pieces(self.location), tokenizer, limit)
        elif self.kind == "jsonl":
            tokens = _tokenise_documents(_json_documents(self.location, self.column), tokenizer, limit)
        elif self.kind == "hub":
            tokens = _tokenise_documents(self._hub_rows(), tokenizer, limit)
        else:
            rows = self._hub_rows()
            tokens = _tokenise_text(chain(islice(rows, 1), ("\n\n" + row for row in rows)), tokenizer, limit)
        if not len(tokens):
            raise MspError(f"{self.spec} holds no text")
        _check_vocabulary(tokens, vocab_size, self.spec)
        return tokens

    def same_text(self, other: TokenSource) -> bool:
        """Whether both read the same file or data set split, be it in another form or field."""
        hub = ("hub", "hub-joined")
        if (self.kind in hub) != (other.kind in hub):
            return False
        if self.kind in hub:
            return (self.location, self.config, self.split) == (other.location, other.config, other.split)
        return Path(self.location).resolve() == Path(other.location).resolve()

    def _hub_rows(self) -> Iterator[str]:
        datasets = importlib.import_module("datasets")
        try:
            rows = iter(datasets.load_dataset(self.location, self.config, split=self.split, streaming=True))
            first = next(rows, None)
        except Exception as error:  # the loaders underneath raise many kinds, none of them ours
            raise MspError(f"{self.spec}: cannot read the data set: {first_line(error)}") from error
        if first is None:
            raise MspError(f"{self.spec} has no rows")
        if self.column not in first:
            raise MspError(f"{self.spec}: no column {self.column!r}; it has {', '.join(map(repr, first))}")
        for number, row in enumerate(chain([first], rows)):
            if not isinstance(row[self.column], str):
                raise MspError(f"{self.spec}: row {number} holds {type(row[self.column]).__name__}, not text")
            yield row[self.column]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _file_pieces(location: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open(location, "rb") as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            held = len(decoder.getstate()[0])
            try:
                piece = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = offset - held + error.start
                raise MspError(
                    f"{location} is not UTF-8 text: byte {place} (0x{error.object[error.start]:02x})"
                ) from error
            yield piece.removeprefix("\ufeff") if not offset else piece
            if not chunk:
                return
            offset += len(chunk)


def _json_documents(location: str, field: str) -> Iterator[str]:
    offset = 0
    with open(location, "rb") as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            where = f"{location}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                place = start + error.start
                raise MspError(f"{where} is not UTF-8 text: byte {place} (0x{line[error.start]:02x})") from error
            except json.JSONDecodeError as error:
                raise MspError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(record, dict):
                raise MspError(f"{where} is not a JSON object but {type(record).__name__}")
            if field not in record:
                raise MspError(f"{where} has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
            if not isinstance(record[field], str):
                raise MspError(f"{where}: field {field!r} holds {type(record[field]).__name__}, not text")
            yield record[field]


def _tokenise_text(pieces: Iterator[str], tokenizer: Any, limit: int | None) -> torch.Tensor:
    """Tokenise the joined pieces as one string, taking no more of them than ``limit`` tokens need."""
    text, wanted = "", limit and limit * _CHARACTERS_PER_TOKEN
    while True:
        parts, length, exhausted = [text], len(text), True
        for piece in pieces:
            parts.append(piece)
            length += len(piece)
            if wanted is not None and length >= wanted:
                exhausted = False
                break
        text = "".join(parts)
        if not text.strip():
            return torch.empty(0, dtype=torch.long)
        tokens = _encode(tokenizer, text)
        if exhausted or limit is None or len(tokens) >= limit + _CUT_MARGIN:
            return torch.tensor(tokens[:limit], dtype=torch.long)
        wanted = 2 * length


def _tokenise_documents(documents: Iterator[str], tokenizer: Any, limit: int | None) -> torch.Tensor:
    """Tokenise each document by itself and join them, BOS (or else EOS) in front of each."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix = [] if start is None else [start]
    tokens: list[int] = []
    while limit is None or len(tokens) < limit:
        batch = list(islice(documents, 128))
        if not batch:
            break
        for ids in _encode(tokenizer, [text for text in batch if text.strip()], add_special_tokens=False):
            tokens += prefix + ids
    return torch.tensor(tokens[:limit], dtype=torch.long)


def _encode(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    # A whole corpus is longer than any context on purpose; verbose=False silences that warning alone.
    return tokenizer(text, verbose=False, **options)["input_ids"] if text else []


def _read_saved(location: str, limit: int | None) -> torch.Tensor:
    try:
        with safe_open(location, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise MspError(f"{location} holds {len(names)} tensors; saved tokens are exactly one of integers")
            tensor = file.get_slice(names[0])
            if tensor.get_dtype() not in _INTEGERS:
                raise MspError(f"{location}: tensor {names[0]!r} is {tensor.get_dtype()}, tokens are integers")
            cut = slice(limit) if len(tensor.get_shape()) == 1 else slice(None)
            tokens = tensor[cut] if tensor.get_shape() else file.get_tensor(names[0])
    except (SafetensorError, OSError) as error:
        raise MspError(f"{location} cannot be read as safetensors: {first_line(error)}") from error
    flat: torch.Tensor = tokens.reshape(-1)[:limit].long()
    return flat


def _check_vocabulary(tokens: torch.Tensor, vocab_size: int, spec: str) -> None:
    largest, smallest = int(tokens.max()), int(tokens.min())
    if largest >= vocab_size:
        raise MspError(
            f"{spec} has token {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "the tokens or the tokenizer belong to another model"
        )
    if smallest < 0:
        raise MspError(f"{spec} has the negative token {smallest}")


def token_windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Cut ``[tokens]`` into non-overlapping windows ``[S, length]``; the rest at the end is dropped."""
    if length < 2:
        raise UsageError(f"a window of {length} tokens predicts nothing: the least is 2")
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def read_windows(
    source: str, tokenizer: Any, vocab_size: int, *, window: int, tokens: int | None = None
) -> torch.Tensor:
    """The first ``tokens`` tokens of ``source`` (all without it) in windows ``[S, window]``, S at least 1.

    Raises:
        MspError: the source is shorter than one window, and all that ``TokenSource.read`` raises.
    """
    limit = None if tokens is None else max(window, tokens)
    found = TokenSource.parse(source).read(tokenizer, vocab_size, limit)
    if len(found) < window:
        raise MspError(f"{source} is too short: {len(found)} tokens found, {window} needed for one window")
    return token_windows(found, window)


@dataclass(frozen=True)
class TokenSets:
    """Three disjoint sets of windows, int64 ``[S, window]`` each, and what the recipe says of them."""

    calibration: torch.Tensor
    fitness: torch.Tensor
    test: torch.Tensor
    window: int
    sources: dict[str, str | int | float]


def make_token_sets(
    source: str,
    tokenizer: Any,
    vocab_size: int,
    *,
    evaluate: str | None = None,
    window: int,
    calibration_tokens: int,
    fitness_tokens: int,
    test_tokens: int | None,
    seed: int,
    fitness_noise: float = 0.0,
) -> TokenSets:
    """Split text into windows for statistics, for the search and for the final figure.

    Calibration and fitness windows are drawn by ``seed`` from ``source``. Test windows never depend
    on the seed: they are the first of ``evaluate``, or, where that is missing or the same text, the
    first of ``source``, which the draw then leaves out.

    Args:
        window: tokens per sequence.
        calibration_tokens: rounded down to windows, at least one (none for 0); so are the other two.
        test_tokens: ``None`` takes all of ``evaluate``.
        fitness_noise: share of the fitness tokens that ``noised`` replaces.

    Raises:
        MspError: too few tokens (says how many were found and needed), and all that reading raises.
        UsageError: a negative count, or a window shorter than 2.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing: the least is 2")
    counts = {"calibration": calibration_tokens, "fitness": fitness_tokens, "test": test_tokens}
    for name, count in counts.items():
        if count is not None and count < 0:
            raise UsageError(f"{count} {name} tokens: a count cannot be negative")
    calibration_windows = _window_count(calibration_tokens, window)
    drawn = calibration_windows + _window_count(fitness_tokens, window)
    parsed = TokenSource.parse(source)
    other = TokenSource.parse(evaluate).check() if evaluate is not None else None
    held_out = other is None or parsed.same_text(other)
    if held_out and test_tokens is None:
        raise UsageError(f"say how many test tokens to hold out of {source}, or give another text to evaluate on")
    first = _window_count(test_tokens or 0, window) if held_out else 0

    tokens = parsed.read(tokenizer, vocab_size, limit=max(1, first + POOL_FACTOR * drawn) * window)
    windows = token_windows(tokens, window)
    if len(windows) < first + drawn:
        raise MspError(
            f"{source} is too short: {len(tokens)} tokens found, {(first + drawn) * window} needed "
            f"({calibration_windows} calibration, {drawn - calibration_windows} fitness and {first} test windows "
            f"of {window} tokens); give more text, ask for fewer tokens or shorten the window"
        )
    order = torch.randperm(len(windows) - first, generator=torch.Generator().manual_seed(seed)) + first
    if held_out:
        test = windows[:first].clone()
    else:
        assert evaluate is not None
        test = read_windows(evaluate, tokenizer, vocab_size, window=window, tokens=test_tokens)
    fitness = windows[order[calibration_windows:drawn]]
    if fitness_noise and len(fitness):
        fitness = noised(fitness, fitness_noise, seed)
    sets = TokenSets(windows[order[:calibration_windows]], fitness, test, window, {})
    sets.sources.update(
        calibration=source,
        evaluate=f"{source} (held out)" if held_out else str(evaluate),
        window=window,
        seed=seed,
        calibration_tokens=sets.calibration.numel(),
        fitness_tokens=sets.fitness.numel(),
        fitness_noise=fitness_noise,
        test_tokens=sets.test.numel(),
    )
    return sets


def noised(windows: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """``windows`` with a share of the tokens replaced by others of theirs, drawn by ``seed``.

    The first token of a window stays (models give it a role of its own), and so do the token counts of the
    text: no token comes in that was not there.
    """
    draw = torch.Generator().manual_seed(seed)
    others = windows.flatten()[torch.randint(windows.numel(), windows.shape, generator=draw)]
    replaced = torch.rand(windows.shape, generator=draw) < share
    replaced[:, 0] = False
    return torch.where(replaced, others, windows)


def _window_count(tokens: int, window: int) -> int:
    return max(1, tokens // window) if tokens else 0


def save_tokens(tokens: torch.Tensor | Iterable[int], path: str | Path) -> None:
    """Write tokens as the one tensor of a safetensors file, to be read back as a source."""
    from msp.files import save_tensors

    flat = tokens if isinstance(tokens, torch.Tensor) else torch.tensor(list(tokens), dtype=torch.long)
    save_tensors({"tokens": flat.contiguous()}, path)
