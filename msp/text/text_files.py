"""Text and records on disk: the content of a file or folder, and readers that read no more of it than requested."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import importlib.util
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msp.errors import MspError, first_line

INSTALL_HUB = "pip install 'mixed-sparsity-pruning[hub]'"

_FORMATS = {
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "jsonlines": "json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "pq": "parquet",
    "arrow": "arrow",
}
_TEXT_SUFFIXES = {"txt", "text", "md"}
_PACKED_SUFFIXES = ("gz", "bz2", "xz", "zst", "lz4", "zip")
# PATH:FIELD, split at the last colon that follows a suffix of records
FIELD_OF = re.compile(rf"(.+\.(?:{'|'.join(_FORMATS)})(?:\.(?:{'|'.join(_PACKED_SUFFIXES)}))?):(.*)", re.I | re.S)

_OPENERS: dict[bytes, Callable[[str], Any]] = {
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9]1AY&SY": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
}
_LFS_POINTER = b"version https://git-lfs."
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it first",
    b"\x04\x22\x4d\x18": "compressed by lz4: decompress it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"PAR1\x15": "a Parquet file: rename it to end in .parquet, and name the field to read, FILE.parquet:FIELD",
    b"ARROW1\0": "an Arrow file: rename it to end in .arrow, and name the field to read, FILE.arrow:FIELD",
    b"%PDF-": "a PDF: save its text first",
    b"\x93NUMPY": "a NumPy array: write tokens with msp.text.token_sets.save_tokens",
    b"\x89HDF": "an HDF5 file: save its text first",
    b"SQLite format 3\0": "an SQLite database: save its text first",
    _LFS_POINTER: "a pointer of git-lfs: fetch the file itself with git lfs pull",
}
# Files that data set libraries and the hub write next to the records of a folder.
_DESCRIPTIONS = re.compile(
    r"(readme|licen[cs]e|citation|changelog)\b.*|dataset_infos?\.json|dataset_dict\.json|state\.json", re.I
)
_MODEL_FILES = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "adapter_config.json",
}
_SPLITS = re.compile(
    r"(?<![a-z])(?:(train|training)|(test|testing|eval|evaluation)|(valid|validation|val|dev))(?![a-z])", re.I
)

_CHUNK_BYTES = 1 << 20
# The part of a text that is searched for JSON. Wrong JSON shows at the first wrong character.
_LOOKED_AT = 1 << 20
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_JSON_LINES_SHARE = 0.9
_MOST_ZEROS = 0.01

T = TypeVar("T")


class Record(NamedTuple):
    """One record and its place, for error messages."""

    where: str
    value: Any


def format_of(location: str | Path) -> str:
    """``json``, ``csv``, ``tsv``, ``parquet``, ``arrow`` or ``tokens`` by the suffix; any other is ``text``.

    Upper and lower case are the same, and a suffix of compression (``.gz``) is ignored.
    """
    suffix = _suffix(location)
    return "tokens" if suffix == "safetensors" else _FORMATS.get(suffix, "text")


def _suffix(location: str | Path) -> str:
    parts = Path(location).name.lower().split(".")[1:]
    if parts and parts[-1] in _PACKED_SUFFIXES:
        parts.pop()
    return parts[-1] if parts else ""


def split_of(name: str) -> str | None:
    """``train``, ``test`` or ``validation`` if the path of a file names one of them as a word."""
    found = _SPLITS.search(name)
    return ("train", "test", "validation")[(found.lastindex or 1) - 1] if found else None


def data_files(location: str) -> list[Path]:
    """The file itself, or the data files of a folder: all of one format, in the order of their paths.

    Raises:
        MspError: no such file, an empty one, or a folder that is a model, has no data files, or has data files of
            several formats or splits, or some that cannot be read.
    """
    path = Path(location)
    if not path.is_dir():
        if not path.is_file():
            raise MspError(
                f"{location} is neither a file nor a folder" if path.exists() else f"{location}: no such file"
            )
        if not path.stat().st_size:
            raise MspError(f"{location} is empty")
        return [path]
    if len(_MODEL_FILES & {entry.name for entry in path.iterdir()}) > 1:
        raise MspError(f"{location} is the folder of a model, not of text")
    files: dict[str, list[Path]] = {}
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "_")))
        for name in names:
            found = format_of(name)
            if name.startswith((".", "_")) or _DESCRIPTIONS.fullmatch(name):
                continue
            if found != "text" or _suffix(name) in _TEXT_SUFFIXES:
                files.setdefault(found, []).append(Path(folder, name))
    if not files:
        raise MspError(
            f"{location} is a folder without data files: it needs text (.txt, .md) or records "
            "(.jsonl, .json, .csv, .tsv, .parquet, .arrow)"
        )
    if len(files) > 1:
        examples = ", ".join(sorted(str(min(of_one).relative_to(path)) for of_one in files.values()))
        raise MspError(f"{location} is a folder with files of several formats ({examples}): name one file")
    ((kind, found_files),) = files.items()
    if kind == "tokens":
        raise MspError(f"{location} is a folder of saved tokens: name one file")
    splits = sorted({split_of(file.relative_to(path).as_posix()) or "" for file in found_files} - {""})
    if len(splits) > 1:
        raise MspError(
            f"{location} is a folder with the splits {' and '.join(splits)}: name one file, "
            f"or one split of records with hub:{location}:{'train' if 'train' in splits else splits[0]}:FIELD"
        )
    for file in found_files:
        if not file.stat().st_size:
            raise MspError(f"{file} is empty")
    return sorted(found_files)


def text_pieces(location: str) -> Iterator[str]:
    """The text of a UTF-8 file in pieces, decompressed if its first bytes are those of gzip, bzip2 or xz.

    Raises:
        MspError: bytes that are not text, or that are a format of another name; names the byte.
        Exception: any error of the file system and the decompressor; ``guarded`` turns it into an ``MspError``.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, begun = 0, 1, False
    with _opened(location) as file:
        while True:
            # read1 returns the bytes before damage; read would lose them
            chunk = file.read1(_CHUNK_BYTES)
            if not offset:
                _check_beginning(location, chunk)
            held = len(decoder.getstate()[0])
            wrong: UnicodeDecodeError | None = None
            try:
                piece = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                wrong = error
                piece = error.object[: error.start].decode("utf-8")
            if piece:
                yield piece if begun else piece.removeprefix("\ufeff")
                begun = True
            if wrong is not None:
                place, byte = offset - held + wrong.start, wrong.object[wrong.start]
                line += piece.count("\n")
                raise MspError(f"{location}, line {line} is not UTF-8 text: byte {place} (0x{byte:02x})") from wrong
            if not chunk:
                return
            offset += len(chunk)
            line += piece.count("\n")


def _opened(location: str) -> Any:
    with open(location, "rb") as file:
        beginning = file.read(10)
    for magic, opener in _OPENERS.items():
        if re.match(magic, beginning):
            return opener(location)
    return open(location, "rb")


def check_pointer(location: str) -> None:
    """Raise ``MspError`` for a file that git-lfs has not fetched yet; no format's reader would name the cause."""
    with open(location, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise MspError(f"{location} is {_NO_TEXT[_LFS_POINTER]}")


def _check_beginning(location: str, chunk: bytes) -> None:
    for magic, what in _NO_TEXT.items():
        if chunk.startswith(magic):
            raise MspError(f"{location} is {what}")
    # Text may hold a stray one; tokens in binary and UTF-16 are full of them.
    if chunk.count(0) > _MOST_ZEROS * len(chunk) and not chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise MspError(f"{location} is not text: byte {chunk.index(0)} is zero, and so are {chunk.count(0) - 1} others")


def check_prose(location: str) -> None:
    """Check the beginning of a text file.

    Raises:
        MspError: bytes that are not text, or JSON, which would be tokenised with its braces and keys.
    """
    looked, whole = [""], True
    for piece in prose_pieces(location):
        looked.append(piece)
        if sum(map(len, looked)) > _LOOKED_AT:
            whole = False
            break
    if _is_json("".join(looked), whole):
        stem = Path(location).name.split(".")[0]
        raise MspError(
            f"{location} holds JSON, not prose: rename it to end in .jsonl or .json, and name the field to read, "
            f"as in {stem}.jsonl:FIELD"
        )


def _is_json(text: str, whole: bool) -> bool:
    """Whether a text, or the beginning of one, parses as JSON or as JSON lines."""
    text = text.strip()
    if text.startswith(("{", "[")):
        try:
            json.loads(text)
            return True
        except json.JSONDecodeError as error:
            if not whole and _is_cut(error, len(text)):
                return True
        except (ValueError, RecursionError):
            return True
    lines = [line for line in text.split("\n") if line.strip()]
    # The last line may be incomplete, because the sample or the file ends in it.
    if len(lines) > 1 and (not whole or (lines[-1].startswith('{"') and not _is_object(lines[-1]))):
        lines.pop()
    return bool(lines) and sum(map(_is_object, lines)) >= _JSON_LINES_SHARE * len(lines)


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_cut(error: json.JSONDecodeError, length: int) -> bool:
    """Whether JSON text of that length is right so far and only ends too early."""
    return error.msg.startswith("Unterminated string") or error.pos >= length - len("\\uXXXX\\uXXXX")


def prose_pieces(location: str) -> Iterator[str]:
    """``text_pieces``, with every error turned into an ``MspError``."""
    return guarded(text_pieces(location), location, "characters", len)


def guarded(items: Iterator[T], name: str, unit: str, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """``items``, with every error of the libraries that read them as an ``MspError``, which gives the number read.

    Raises:
        MspError: an item that cannot be read.
    """
    count = 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except MspError:
            raise
        except Exception as error:  # decompressors, parsers and connections raise many kinds
            reached = f"breaks off after {count} {unit}" if count else "cannot be read"
            raise MspError(f"{name} {reached}: {first_line(error)}") from error
        yield item
        count += size(item)


def file_records(path: Path, field: str | None = None) -> Iterator[Record]:
    """The records of a file in a format of records; from Parquet only the column of ``field``, if it is given.

    Raises:
        MspError: a library is not installed; git-lfs has not fetched the file yet; the file breaks off; or a record
            does not parse.
    """
    location, kind = str(path), format_of(path)
    if kind in ("parquet", "arrow"):
        if importlib.util.find_spec("pyarrow") is None:
            raise MspError(f"{location} needs the pyarrow library, which comes with datasets: {INSTALL_HUB}")
        rows = guarded(_parquet_rows(location, field) if kind == "parquet" else _arrow_rows(location), location, "rows")
        return (Record(f"{location}, row {number}", row) for number, row in enumerate(rows))
    records = _json_records(location) if kind == "json" else _csv_records(location, "\t" if kind == "tsv" else ",")
    return guarded(records, location, "records")


def _parquet_rows(location: str, field: str | None) -> Iterator[Any]:
    check_pointer(location)
    with importlib.import_module("pyarrow.parquet").ParquetFile(location) as file:
        columns = [name for name in file.schema_arrow.names if field and f"{field}.".startswith(f"{name}.")]
        for batch in file.iter_batches(batch_size=256, columns=columns or None):
            yield from batch.to_pylist()


def _arrow_rows(location: str) -> Iterator[Any]:
    check_pointer(location)
    arrow, ipc = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.ipc")
    # mapped: a wrong length then points past the end of the file, and no memory is allocated for it
    with arrow.memory_map(location) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch.validate(full=True)  # pyarrow does not check the offsets in a file before it reads there
            for start in range(0, batch.num_rows, 256):
                yield from batch.slice(start, 256).to_pylist()


def _csv_records(location: str, delimiter: str) -> Iterator[Record]:
    # A document may be longer than the 128 KiB that the parser allows for a field by default.
    csv.field_size_limit(max(csv.field_size_limit(), (1 << 31) - 1))
    reader = csv.reader(_lines(text_pieces(location)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{location}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise MspError(f"{where} is not {'CSV' if delimiter == ',' else 'TSV'}: {error}") from error
        if not row:
            continue
        if header is None:
            header = row
            continue
        if len(row) != len(header):
            raise MspError(f"{where} has {len(row)} fields, but the header has {len(header)}")
        yield Record(where, dict(zip(header, row, strict=True)))


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Lines with their ends, cut at line feeds alone."""
    held: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        held.append(first)
        for other in others:
            yield "".join(held) + "\n"
            held = [other]
    if any(held):
        yield "".join(held)


def _json_records(location: str) -> Iterator[Record]:
    """The values of JSON text: the members of one array, or values one after another, as in JSON lines."""
    text, number = _JsonText(text_pieces(location)), 0
    if text.peek() != "[":
        while text.peek():
            where = f"{location}, line {text.line}"
            yield Record(where, text.value(where))
        return
    text.at += 1
    while text.peek() != "]":
        if number:
            if text.peek() != ",":
                what = "does not end after" if text.peek() else "is cut off after"
                raise MspError(f"{location} is not JSON: its array {what} record {number}")
            text.at += 1
            text.peek()
        number += 1
        where = f"{location}, record {number}"
        yield Record(where, text.value(where))
    text.at += 1
    if text.peek():
        raise MspError(f"{location} is not JSON: it goes on after its array of {number} records")


class _JsonText:
    """JSON text that is read piece by piece; parsed text is dropped."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.at = 0
        self._pieces = pieces
        self._text = ""
        self._line, self._counted = 1, 0
        self._broken: Exception | None = None
        self._decode = json.JSONDecoder().raw_decode

    @property
    def line(self) -> int:
        """The line of ``at``, from 1."""
        self._line += self._text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """The next character that is no space, and ``at`` moves to it; "" at the end."""
        while True:
            space = _JSON_SPACE.match(self._text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._grow():
                return ""

    def value(self, where: str) -> Any:
        """The value that begins at ``at``."""
        while True:
            try:
                found, self.at = self._decode(self._text, self.at)
                return found
            except json.JSONDecodeError as error:
                if _is_cut(error, len(self._text)) and self._grow():
                    continue
                rest = error.doc[error.pos : error.pos + 20]
                place = f"at {rest!r}" if rest else "at the end of the file"
                raise MspError(f"{where} is not JSON: {error.msg} {place}") from error
            except (ValueError, RecursionError) as error:
                raise MspError(f"{where} is not JSON that can be read: {first_line(error)}") from error

    def _grow(self) -> bool:
        """Read about as much again as is held; returns whether there was any text left."""
        if self._broken is not None:
            raise self._broken
        _ = self.line
        parts = [self._text[self.at :]]
        self.at = self._counted = added = 0
        try:
            for piece in self._pieces:
                parts.append(piece)
                added += len(piece)
                if added and added >= len(parts[0]):
                    break
        except Exception as error:
            # The text before the error is parsed first, so that the error names the right record.
            if not added:
                raise
            self._broken = error
        self._text = "".join(parts)
        return added > 0
