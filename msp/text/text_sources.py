"""Text sources: the meaning of a source's description, and the tokens that are read from it."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from msp.base.files import name_alone
from msp.errors import MspError, UsageError, first_line
from msp.text.documents import Document, documents, text_or_chat
from msp.text.text_files import (
    FIELD_OF,
    INSTALL_HUB,
    Record,
    check_pointer,
    check_prose,
    data_files,
    file_records,
    format_of,
    guarded,
    prose_pieces,
    split_of,
)

# The usual calibration text of the literature, and the usual text of published perplexities.
DEFAULT_CALIBRATION = "hub:allenai/c4:en:train:text"
DEFAULT_EVALUATION = "hub-joined:Salesforce/wikitext:wikitext-2-raw-v1:test:text"

SOURCE_FORMS = (
    "text.txt, records.jsonl:FIELD (or .json, .ndjson, .csv, .tsv, .parquet, .arrow), FOLDER[:FIELD], "
    "tokens.safetensors, hub:DATASET[:CONFIG]:SPLIT:COLUMN or hub-joined:DATASET[:CONFIG]:SPLIT:COLUMN"
)

_INTEGERS = {"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64"}
_CHARACTERS_PER_TOKEN = 5
# The last tokens of a text that was cut short may differ from those of the whole text.
_CUT_MARGIN = 64


@dataclass(frozen=True)
class TokenSource:
    """A place to read tokens from.

    ``spec`` is one of

    - ``text.txt`` (any suffix that is not listed below): tokenised as ONE string with the tokenizer's own special
      tokens once, the way perplexities are published;
    - ``records.jsonl:FIELD`` (``text`` by default), also ``.json``, ``.ndjson``, ``.csv``, ``.tsv``, ``.parquet`` and
      ``.arrow``: each record is a document, tokenised by itself after the tokenizer's BOS, or else its EOS, if it has
      one. ``FIELD.SUB`` is a field of a nested record. The tokenizer's chat template writes a field that holds a chat,
      with all special tokens;
    - ``FOLDER[:FIELD]``: its data files, which are all of one format; a file of text is a document too;
    - ``tokens.safetensors``: exactly one integer tensor, read in row order;
    - ``hub:DATASET[:CONFIG]:SPLIT:COLUMN``: each row of a hub data set a document, as for records;
    - ``hub-joined:DATASET[:CONFIG]:SPLIT:COLUMN``: the rows joined by blank lines into one text.

    Files compressed by gzip, bzip2 or xz are decompressed during reading, except ``.parquet`` and ``.arrow``.
    """

    spec: str
    kind: Literal["file", "tokens", "hub", "hub-joined"]
    location: str
    column: str = "text"
    config: str | None = None
    split: str = ""

    @classmethod
    def parse(cls, spec: str) -> TokenSource:
        """Parse a source's description; opens no file.

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
        if not spec.strip():
            raise UsageError(f"an empty source; write {SOURCE_FORMS}")
        path, field = spec, "text"
        if named := FIELD_OF.fullmatch(spec):
            path, field = named.groups()
        elif ":" in spec and not os.path.exists(spec) and os.path.isdir(spec.rpartition(":")[0]):
            path, _, field = spec.rpartition(":")
        if not field:
            raise UsageError(f"source {spec!r} names no field: write {path}:FIELD")
        return cls(spec, "tokens" if format_of(path) == "tokens" else "file", path, column=field)

    def check(self) -> TokenSource:
        """Check all that can be checked without a tokenizer or the network.

        Raises:
            MspError: no such file or an empty one, a folder that cannot be read as text, a library that is not
                installed, bytes that are not text, JSON in a text file, a first record without the field.
        """
        if self._is_hub:
            if importlib.util.find_spec("datasets") is None:
                raise MspError(f"{self.spec} is a hub data set, which needs the datasets library: {INSTALL_HUB}")
            if os.path.isdir(self.location):
                self._check_first(self._hub_rows())
            elif self.location.startswith((".", "/", "~")):
                raise MspError(f"{self.spec}: no such folder as {self.location}")
            return self
        files = self._files()
        if self.kind == "tokens":
            _read_saved(self.location, 1)
        elif format_of(files[0]) != "text":
            # With all columns, so that an error can list them.
            self._check_first(chain.from_iterable(file_records(file) for file in files))
        elif self.column != "text":
            raise MspError(f"{self.location} holds text files, which have no fields: leave out :{self.column}")
        else:
            check_prose(str(files[0]))
        return self

    def read(self, tokenizer: Any, vocab_size: int, limit: int | None = None) -> torch.Tensor:
        """The first ``limit`` tokens (all tokens if it is None), int64 ``[tokens]``.

        Args:
            tokenizer: a Hugging Face tokenizer; ``None`` is enough for saved tokens.
            vocab_size: rows of the model's embedding; every token must be below it.
            limit: reading stops soon after this many tokens.

        Raises:
            MspError: all errors of ``check``, a record without the field, a source that breaks off or cannot be
                decoded, no tokenizer or one that refuses the text, a chat without a chat template, a token outside the
                vocabulary; the message names the file and the place in it.
        """
        self.check()
        if self.kind == "tokens":
            tokens = _read_saved(self.location, limit)
        elif tokenizer is None:
            raise MspError(f"the model has no tokenizer to read {self.spec} with: give saved tokens (.safetensors)")
        elif self.kind == "hub-joined":
            tokens = _tokenise_text(self._joined_rows(tokenizer), tokenizer, limit, self.spec)
        elif self.kind == "hub":
            tokens = _tokenise_documents(documents(self._hub_rows(), self.column, tokenizer), tokenizer, limit)
        elif os.path.isfile(self.location) and format_of(self.location) == "text":
            tokens = _tokenise_text(prose_pieces(self.location), tokenizer, limit, self.spec)
        else:
            tokens = _tokenise_documents(self._file_documents(tokenizer), tokenizer, limit)
        if not len(tokens):
            raise MspError(f"{self.spec} holds no text")
        _check_vocabulary(tokens, vocab_size, self.spec)
        return tokens

    @property
    def shown(self) -> str:
        """``spec`` without the parent folders of a file or folder."""
        return self.spec.replace(self.location, name_alone(self.location), 1)

    def same_text(self, other: TokenSource) -> bool:
        """Whether both read a common file, or the same split of a data set, in any form or field.

        Raises:
            MspError: a file or folder that ``check`` would refuse too.
        """
        if self._is_hub and other._is_hub:
            sets = [(_absolute(source.location), source.config or "default") for source in (self, other)]
            return sets[0] == sets[1] and bool(self._splits & other._splits)
        if self._is_hub:
            return other.same_text(self)
        if not other._is_hub:
            mine, theirs = ({_identity(file) for file in source._files()} for source in (self, other))
            return bool(mine & theirs)
        folder = Path(other.location).resolve()
        inside = [file for file in (file.resolve() for file in self._files()) if folder in file.parents]
        splits = [split_of(file.relative_to(folder).as_posix()) for file in inside]
        return any(split is None or split in other._splits for split in splits)

    @property
    def _is_hub(self) -> bool:
        return self.kind in ("hub", "hub-joined")

    @property
    def _splits(self) -> set[str]:
        return set(self.split.split("+"))

    def _files(self) -> list[Path]:
        if not os.path.exists(self.location):
            head = self.location.rpartition(":")[0]
            if "://" in self.location:
                raise MspError(f"{self.spec} is an address on the network: download the file first")
            if os.path.isfile(head):
                raise MspError(f"{head} is a text file, which has no fields: leave out {self.location[len(head) :]}")
            raise MspError(f"{self.location}: no such file (a source is {SOURCE_FORMS})")
        try:
            return data_files(self.location)
        except OSError as error:
            raise MspError(f"{self.location} cannot be read: {first_line(error)}") from error

    def _check_first(self, records: Iterator[Record]) -> None:
        first = next(records, None)
        if first is None:
            raise MspError(f"{self.spec} has no records")
        text_or_chat(first, self.column)

    def _file_documents(self, tokenizer: Any) -> Iterator[Document]:
        for file in self._files():
            if format_of(file) == "text":
                check_prose(str(file))
                yield Document(str(file), "".join(prose_pieces(str(file))))
            else:
                yield from documents(file_records(file, self.column), self.column, tokenizer)

    def _hub_rows(self) -> Iterator[Record]:
        rows = guarded(self._stream(), f"{self.spec}: the data set", "rows")
        return (Record(f"{self.spec}, row {number}", row) for number, row in enumerate(rows))

    def _stream(self) -> Iterator[Any]:
        datasets = importlib.import_module("datasets")
        rows = datasets.load_dataset(self.location, self.config, split=self.split, streaming=True)
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise MspError(f"{self.spec} has no rows")

    def _joined_rows(self, tokenizer: Any) -> Iterator[str]:
        for number, document in enumerate(documents(self._hub_rows(), self.column, tokenizer)):
            if document.is_chat:
                raise MspError(f"{document.where} holds a chat, and chats are not joined into one text: write hub:")
            yield "\n\n" + document.text if number else document.text


def _absolute(location: str) -> str:
    """One name for a data set, or for its folder."""
    return str(Path(location).resolve()) if os.path.isdir(location) else location


def _identity(file: Path) -> tuple[int, int]:
    # links and other spellings lead to the same file
    found = file.stat()
    return found.st_dev, found.st_ino


def _tokenise_text(pieces: Iterator[str], tokenizer: Any, limit: int | None, spec: str) -> torch.Tensor:
    """Tokenise the joined pieces as one string; takes no more of them than ``limit`` tokens need."""
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
        try:
            tokens = _encode(tokenizer, text)
        except Exception as error:  # a tokenizer may raise any kind
            raise MspError(f"{spec}: the tokenizer refuses the text: {first_line(error)}") from error
        if exhausted or limit is None or len(tokens) >= limit + _CUT_MARGIN:
            return torch.tensor(tokens[:limit], dtype=torch.long)
        wanted = 2 * length


def _tokenise_documents(documents: Iterator[Document], tokenizer: Any, limit: int | None) -> torch.Tensor:
    """Tokenise each document by itself and join them, with BOS (or else EOS) before each document that is no chat."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix = [] if start is None else [start]
    tokens: list[int] = []
    while limit is None or len(tokens) < limit:
        batch = list(islice(documents, 128))
        if not batch:
            break
        batch = [document for document in batch if document.text.strip()]
        for document, ids in zip(batch, _encode_each(tokenizer, batch), strict=True):
            tokens += ids if document.is_chat else prefix + ids
    return torch.tensor(tokens[:limit], dtype=torch.long)


def _encode_each(tokenizer: Any, batch: list[Document]) -> list[list[int]]:
    try:
        found: list[list[int]] = _encode(tokenizer, [document.text for document in batch], add_special_tokens=False)
        return found
    except Exception as error:  # a tokenizer may raise any kind, without the document
        for document in batch:
            try:
                _encode(tokenizer, [document.text], add_special_tokens=False)
            except Exception as its_error:
                reason = first_line(its_error)
                raise MspError(f"{document.where}: the tokenizer refuses the text: {reason}") from its_error
        raise MspError(f"{batch[0].where}: the tokenizer refuses the text: {first_line(error)}") from error


def _encode(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    # A whole corpus is longer than any context on purpose; verbose=False silences that warning alone.
    return tokenizer(text, verbose=False, **options)["input_ids"] if text else []


def _read_saved(location: str, limit: int | None) -> torch.Tensor:
    try:
        check_pointer(location)
        with safe_open(location, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise MspError(f"{location} holds {len(names)} tensors; saved tokens are exactly one of integers")
            tensor = file.get_slice(names[0])
            if tensor.get_dtype() not in _INTEGERS:
                raise MspError(f"{location}: tensor {names[0]!r} is {tensor.get_dtype()}, tokens are integers")
            shape = tensor.get_shape()
            rows = None if limit is None else math.ceil(limit / max(1, math.prod(shape[1:])))
            tokens = tensor[slice(rows)] if shape else file.get_tensor(names[0])
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
