"""Formats of text and records: what is read is the same in each, and what cannot be read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import VOCABULARY, byte_tokenizer, random_text

from msp.errors import MspError, UsageError
from msp.text import text_files
from msp.text.token_sets import TokenSource

TOKENIZER = byte_tokenizer()


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def json_array(texts: list[str], **style: object) -> bytes:
    return json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], **style).encode()  # type: ignore[arg-type]


def raw_json_lines(texts: list[str]) -> bytes:
    """With a byte order mark, characters as they are, and no line feed at the end."""
    lines = [json.dumps({"text": text, "more": [{}]}, ensure_ascii=False) for text in texts]
    return "\n \r\n".join(lines).encode("utf-8-sig")


def separated(texts: list[str], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def arrow(texts: list[str], kind: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
    out = io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, out, row_group_size=3)
    else:
        opened = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with opened(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return out.getvalue()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": json_lines,
    "A.JSONL": json_lines,
    "a.ndjson": raw_json_lines,
    "lines.json": json_lines,
    "array.json": json_array,
    "PRETTY.Json": lambda texts: json_array(texts, indent=2, ensure_ascii=False),
    "one after another.json": lambda texts: "\n".join(json.dumps({"text": t}, indent=1) for t in texts).encode(),
    "a.jsonl.gz": lambda texts: gzip.compress(json_lines(texts)),
    "a.json.bz2": lambda texts: bz2.compress(json_array(texts)),
    "a.json.xz": lambda texts: lzma.compress(json_array(texts)),
    "unpacked.jsonl.gz": json_lines,
    "a.csv": lambda texts: separated(texts, ","),
    "a.CSV.gz": lambda texts: gzip.compress(separated(texts, ",")),
    "a.tsv": lambda texts: separated(texts, "\t"),
    "a.parquet": lambda texts: arrow(texts, "parquet"),
    "stream.arrow": lambda texts: arrow(texts, "stream"),
    "file.arrow": lambda texts: arrow(texts, "file"),
}


def read(source: str | Path, limit: int | None = None) -> list[int]:
    found: list[int] = TokenSource.parse(str(source)).read(TOKENIZER, VOCABULARY, limit).tolist()
    return found


def tokens_of(texts: list[str]) -> list[int]:
    found: list[int] = []
    for text in texts:
        if text.strip():
            found += [TOKENIZER.bos_token_id, *TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    return found


# A zero byte is no text in a CSV file, and half a surrogate pair is none anywhere.
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30), min_size=1)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, chunk=st.integers(1, 200))
def test_the_same_records_give_the_same_tokens_in_every_format(name: str, texts: list[str], chunk: int, tmp_path: Path):
    texts = [*texts, "the fox, \"so\" it\r\nsays\n\n{'a': [1]}\\u00e9 🦊"]
    (tmp_path / name).write_bytes(FORMATS[name](texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK_BYTES", chunk)
        assert read(tmp_path / name) == tokens_of(texts)
        assert read(f"{tmp_path / name}:text", 9) == tokens_of(texts)[:9]


@pytest.mark.parametrize("name", FORMATS)
def test_a_field_that_is_not_there_is_named_early_with_those_that_are(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(FORMATS[name](["the fox"]))
    with pytest.raises(MspError, match=r"has no field 'body'; it has .*'text'") as error:
        TokenSource.parse(f"{tmp_path / name}:body").check()
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_documents_may_be_long(name: str, tmp_path: Path):
    texts = ["the fox " * 30_000, "over"]
    content = separated(texts, ",") if name == "a.csv" else json_array(texts)
    (tmp_path / name).write_bytes(json_lines(texts) if name == "a.jsonl" else content)
    assert read(tmp_path / name, 20) == tokens_of(texts)[:20]


def test_one_object_is_one_record(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "the fox", "rest": {"a": [1, 2]}}, indent=4))
    assert read(tmp_path / "a.json") == tokens_of(["the fox"])


def test_a_huge_array_is_read_at_its_beginning_only(tmp_path: Path, monkeypatch):
    (tmp_path / "a.json").write_bytes(json_array(["the fox " * 50] * 20_000)[:-9] + b" nonsense")
    lengths, pieces_of = [], text_files.text_pieces

    def watched(location: str) -> Iterator[str]:
        for piece in pieces_of(location):
            lengths.append(len(piece))
            yield piece

    monkeypatch.setattr(text_files, "text_pieces", watched)
    assert len(read(tmp_path / "a.json", 1000)) == 1000
    assert 0 < sum(lengths) <= 4 << 20 < (tmp_path / "a.json").stat().st_size


PACKED = {
    "a.jsonl.gz": lambda texts: gzip.compress(json_lines(texts)),
    "a.json.gz": lambda texts: gzip.compress(json_array(texts)),
    "a.jsonl.bz2": lambda texts: bz2.compress(json_lines(texts)),
    "a.csv.gz": lambda texts: gzip.compress(separated(texts, ",")),
    "a.tsv.xz": lambda texts: lzma.compress(separated(texts, "\t")),
    "a.parquet": lambda texts: arrow(texts, "parquet"),
    "stream.arrow": lambda texts: arrow(texts, "stream"),
    "file.arrow": lambda texts: arrow(texts, "file"),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_a_file_that_breaks_off_is_named(name: str, share: float, tmp_path: Path):
    whole = PACKED[name]([random_text(seed, 60) for seed in range(1000)])
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(MspError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert any(words in str(error.value) for words in ("breaks off after ", "cannot be read"))


@pytest.mark.parametrize("make", [json_lines, json_array, lambda texts: separated(texts, ",")])
def test_the_records_before_the_damage_are_all_counted(make: Callable[[list[str]], bytes], tmp_path: Path):
    name = "a.csv.gz" if make not in (json_lines, json_array) else "a.json.gz"
    texts = [random_text(seed, 60) for seed in range(1000)]
    cut = gzip.compress(make(texts))[:-3000]
    (tmp_path / name).write_bytes(cut)
    found = zlib.decompressobj(31).decompress(cut)
    within = max(n for n in range(1000) if found.startswith(make(texts[:n]).rstrip(b"]\r\n")))
    with pytest.raises(MspError, match="breaks off after") as error:
        read(tmp_path / name)
    count = int(str(error.value).partition("after ")[2].split()[0])
    assert 0 < within - 60 < count <= within, "the decompressor itself gives blocks of some kilobytes"
    # and what lies before the damage can be used
    assert read(tmp_path / name, 1000) == tokens_of(texts)[:1000]


def test_damage_inside_is_named_by_row(tmp_path: Path):
    whole = bytearray(arrow([random_text(seed, 500) for seed in range(1500)], "parquet"))
    middle = len(whole) // 2
    whole[middle : middle + 2000] = bytes(random.Random(1).randbytes(2000))
    (tmp_path / "a.parquet").write_bytes(whole)
    with pytest.raises(MspError, match=r"a\.parquet breaks off after \d+ rows: "):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_damaged_arrow_is_refused_and_no_crash(kind: str, tmp_path: Path):
    """An offset that leads out of the file is a crash to pyarrow, and a length that is wrong takes gigabytes."""
    texts = [random_text(seed, 20) for seed in range(6)]
    whole, (path,) = arrow(texts, kind), [tmp_path / "a.arrow"]
    # the offsets of the texts in the first batch, as they lie in the file
    ends = [0]
    for text in texts[:3]:
        ends.append(ends[-1] + len(text.encode()))
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    assert whole.count(offsets) == 1
    at = whole.index(offsets)
    for wrong in (1 << 30, (1 << 31) - 1, -5):
        path.write_bytes(whole[: at + 8] + wrong.to_bytes(4, "little", signed=True) + whole[at + 12 :])
        with pytest.raises(MspError, match=r"a\.arrow cannot be read: "):
            read(path)
    path.write_bytes(whole)
    assert read(path) == tokens_of(texts)


def test_text_that_breaks_off_is_named(tmp_path: Path):
    whole = gzip.compress(random_text(1, 100_000).encode())
    (tmp_path / "a.txt.gz").write_bytes(whole)
    assert read(tmp_path / "a.txt.gz", 50) == TOKENIZER(random_text(1, 100_000))["input_ids"][:50]
    (tmp_path / "a.txt.gz").write_bytes(whole[:-1000])
    with pytest.raises(MspError, match=r"a\.txt\.gz breaks off after \d+ characters"):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text": "b"}', "array is cut off after record 2"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "array does not end after record 1"),
        ("a.json", '[{"text": "a"}, {"text": "b]', "record 2 is not JSON: Unterminated string"),
        ("a.json", '[{"text": "a"}] []', "goes on after its array of 1 records"),
        ("a.json", '[{"text": "a"}, {"text": tea}]', r"record 2 is not JSON: Expecting value at 'tea}]'"),
        ("a.json", "[]", "has no records"),
        ("a.json", "[" * 100_000, "record 1 is not JSON that can be read"),
        ("a.json", '{"a": ' + "9" * 5000 + "}", "line 1 is not JSON that can be read"),
        ("a.json", '"text"', "is not a JSON object but str"),
        ("a.json", '{\n"text": "a",\n"b": c}', "line 1 is not JSON: Expecting value at 'c}'"),
        ("a.json", '{"text": "a"}\n\n{"text": "b" "c"}', "line 3 is not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "line 2: field 'text' holds null"),
        ("a.csv", "id,text\n1,a\n2\n", "line 3 has 1 fields, but the header has 2"),
        ("a.csv", 'id,text\n1,"a\nb"\n2,"b\n\n', "line 4 is not CSV: unexpected end of data"),
        ("a.tsv", "id\ttext\n1\ta\tb\n", "line 2 has 3 fields, but the header has 2"),
        ("a.csv", "id,text\n", "has no records"),
        ("a.csv", "id,text\n1,\n", "holds no text"),
        ("a.parquet", "not Parquet", "cannot be read: Parquet"),
        ("a.arrow", "not Arrow", "cannot be read: "),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_bad_records_are_named(name: str, content: str, message: str, chunk: int, tmp_path: Path, monkeypatch):
    if name.endswith((".parquet", ".arrow")):
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", chunk)
    (tmp_path / name).write_text(content)
    with pytest.raises(MspError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.safetensors", "a.txt", "a.jsonl", "a.csv"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path):
    if name in ("a.parquet", "a.arrow"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    with pytest.raises(MspError, match="git lfs pull") as error:
        TokenSource.parse(str(tmp_path / name)).check()
    assert name in str(error.value)


def test_what_is_not_utf8_is_named_by_line(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,the fox\n2,caf\xe9\n")
    with pytest.raises(MspError, match=r"a\.csv, line 3 is not UTF-8 text: byte 23 \(0xe9\)"):
        read(tmp_path / "a.csv")


RECORDS = json.dumps({"text": "the fox", "n": [1, {}]})
NOT_PROSE = {
    "one object": RECORDS,
    "a pretty object": json.dumps(json.loads(RECORDS), indent=2),
    "an array": f"[{RECORDS}, {RECORDS}]",
    "a pretty array": json.dumps([json.loads(RECORDS)] * 3, indent=2),
    "an array of strings": '["the fox", "jumps"]',
    "JSON lines": "\n".join([RECORDS] * 5) + "\n",
    "JSON lines with a mark of byte order": "\ufeff" + "\n".join([RECORDS] * 5),
    "JSON lines of which the last is cut off": "\n".join([RECORDS] * 2) + "\n" + RECORDS[:-3],
    "JSON lines after a remark": "# records\n" + "\n".join([RECORDS] * 20),
    "many JSON lines": "\n".join([RECORDS] * 40_000),
    "a long array": "[" + ",\n".join([RECORDS] * 40_000) + "]",
    "a long line": json.dumps({"text": "the fox " * 200_000}) + "\n" + RECORDS,
    "a long object": json.dumps({f"key {i}": "the fox " * 10 for i in range(20_000)}),
}


@pytest.mark.parametrize("name", ["a.txt", "README.md", "part-00000", "a.log"])
@pytest.mark.parametrize("content", NOT_PROSE)
def test_json_is_not_read_as_prose(content: str, name: str, tmp_path: Path):
    (tmp_path / name).write_text(NOT_PROSE[content])
    with pytest.raises(MspError, match=r"holds JSON, not prose: .*\.jsonl:FIELD") as error:
        TokenSource.parse(str(tmp_path / name)).check()
    assert name in str(error.value)


PROSE = {
    "a bracket": "[The fox] jumps over the lazy dog.",
    "a citation": "[1] The fox, 1999.\n[2] The dog, 2001.\n",
    "a stage direction": "[Enter FOX]\nFOX. The dog!\n[Exeunt]",
    "a brace": "{The fox} jumps",
    "one line of JSON": f"{RECORDS}\nThat was a record, and this is not.\n",
    "JSON in a manual": "An answer looks like this:\n\n" + "\n\nor like this:\n\n".join([RECORDS] * 30),
    "a Python dictionary": "{'text': 'the fox', 'n': 1}",
    "source code": "{\n  int n = 1;\n  return n;\n}\n",
    "a template": "{{ fox }} jumps over [{{ dog }}]",
    "a long text in braces": "{" + "the fox jumps " * 200_000 + "}",
    "a quoted sentence": '"The fox jumps."',
    "a number": "1984",
    "a text about bzip2": "BZh is how such files begin.",
    "a text about Parquet": "PAR1 is how such files begin.",
}


@pytest.mark.parametrize("content", PROSE)
def test_prose_that_looks_like_json_is_prose(content: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(PROSE[content])
    assert read(tmp_path / "a.txt", 200) == TOKENIZER(PROSE[content][:2000])["input_ids"][:200]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from('[]{}":, a1\n'), min_size=1, max_size=12), filler=st.integers(0, 1))
def test_what_parses_is_refused_and_nothing_else(text: str, filler: int, tmp_path: Path):
    """For texts of one value: the parser of the standard library decides."""
    if not text.strip() or len([line for line in text.split("\n") if line.strip()]) > 1:
        return
    (tmp_path / "a.txt").write_text(text)
    try:
        is_json = isinstance(json.loads(text), dict | list)
    except ValueError:
        is_json = False
    try:
        TokenSource.parse(str(tmp_path / "a.txt")).check()
        assert not is_json
    except MspError as error:
        assert is_json and "holds JSON" in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (arrow(["a"], "parquet"), "is a Parquet file: rename it"),
        (arrow(["a"], "file"), "is an Arrow file: rename it"),
        (b"\x28\xb5\x2f\xfd\x04\x58", "compressed by zstd: decompress it"),
        (b"PK\x03\x04 and so on", "is a zip archive: unpack it first"),
        (b"the\0fox", "is not text: byte 3 is zero"),
        (gzip.compress(arrow(["a"], "parquet")), "is a Parquet file"),
        (b"%PDF-1.7 %", "is a PDF"),
        ("the fox".encode("utf-16"), r"is not UTF-8 text: byte 0 \(0xff\)"),
        ("the fox".encode("utf-16-le"), "byte 1 is zero, and so are 6 others"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl.zst", "a.csv"])
def test_other_formats_are_told_by_their_bytes(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MspError, match=message):
        TokenSource.parse(str(tmp_path / name)).check()


def test_gzip_under_any_name_is_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"the quick fox"))
    assert read(tmp_path / "a.txt") == TOKENIZER("the quick fox")["input_ids"]
    (tmp_path / "a.txt").write_bytes(gzip.compress(json_lines(["the quick fox"])))
    with pytest.raises(MspError, match="holds JSON"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_without_pyarrow_the_extra_is_named(name: str, tmp_path: Path, monkeypatch):
    (tmp_path / name).write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MspError, match=r"pip install 'mixed-sparsity-pruning\[hub\]'"):
        TokenSource.parse(f"{tmp_path / name}:text").check()


def test_json_csv_and_gzip_need_no_library(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("a.jsonl.gz", "array.json", "a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(FORMATS[name](["the fox"]))
        assert read(tmp_path / name) == tokens_of(["the fox"])


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.bz2", "a.csv", "a.parquet"])
def test_a_folder_of_records(name: str, tmp_path: Path):
    texts = [random_text(seed, 20) for seed in range(9)]
    files = {f"data:set/train/{i}-{name}": FORMATS[name](texts[i : i + 3]) for i in (6, 0, 3)}
    beside = {"README.md": b"# A data set", ".git/config": b"x", "dataset_infos.json": b"{}", "code.py": b"x = 1"}
    folder_of(tmp_path, files | beside)
    for source in (tmp_path, f"{tmp_path}:text", f"{tmp_path}/data:set:text", f"{tmp_path}/data:set/"):
        assert read(source) == tokens_of(texts)
    with pytest.raises(MspError, match=r"0-.* has no field 'body'"):
        TokenSource.parse(f"{tmp_path}:body").check()


def test_a_folder_of_text_is_a_document_a_file(tmp_path: Path):
    texts = [random_text(seed, 20) for seed in range(3)]
    folder_of(tmp_path, {f"{i}.txt": text.encode() for i, text in enumerate(texts)})
    assert read(tmp_path) == tokens_of(texts)
    (tmp_path / "3.txt").write_bytes(json_lines(["a"]))
    with pytest.raises(MspError, match=r"3\.txt holds JSON"):
        read(tmp_path)
    with pytest.raises(MspError, match="holds text files, which have no fields"):
        TokenSource.parse(f"{tmp_path}:body").check()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "model.safetensors", "tokenizer.json"], "is the folder of a model"),
        (["README.md", "code.py", "picture.png"], "is a folder without data files"),
        ([], "is a folder without data files"),
        (["a.jsonl", "b.csv"], r"files of several formats \(a.jsonl, b.csv\)"),
        (["a.txt", "b.jsonl"], r"files of several formats \(a.txt, b.jsonl\)"),
        (["a.safetensors"], "is a folder of saved tokens"),
        (["train-0.jsonl", "test-0.jsonl"], r"the splits test and train: .*hub:.*:train:FIELD"),
        (["data/train/0.txt", "data/validation/0.txt"], "the splits train and validation"),
    ],
)
def test_folders_that_do_not_serve_are_refused(files: list[str], message: str, tmp_path: Path):
    folder_of(tmp_path / "set", {name: b'{"text": "a"}' for name in files})
    (tmp_path / "set").mkdir(exist_ok=True)
    with pytest.raises(MspError, match=message) as error:
        TokenSource.parse(str(tmp_path / "set")).check()
    assert str(tmp_path / "set") in str(error.value)


def test_an_empty_file_of_a_folder_is_named(tmp_path: Path):
    folder_of(tmp_path, {"a.jsonl": json_lines(["a"]), "b.jsonl": b""})
    with pytest.raises(MspError, match=r"b\.jsonl is empty"):
        TokenSource.parse(str(tmp_path)).check()


def test_sources_that_are_no_such_file_say_what_was_meant(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the fox")
    folder_of(tmp_path / "folder.safetensors", {"a.txt": b"the fox"})
    for source, message in [
        (f"{tmp_path}/a.txt:body", r"a\.txt is a text file, which has no fields: leave out :body"),
        ("https://example.com/a.jsonl:text", "is an address on the network: download the file first"),
        (f"{tmp_path}/gone.parquet:text", r"gone\.parquet: no such file"),
        ("/dev/null", "neither a file nor a folder"),
        ("the fox: jumps " * 1000, "no such file"),
        (f"{tmp_path}/folder.safetensors", "cannot be read as safetensors: .* directory"),
        (f"hub:{tmp_path}/gone:train:text", "no such folder"),
    ]:
        with pytest.raises(MspError, match=message):
            TokenSource.parse(source).check()
    with pytest.raises(UsageError, match="names no field"):
        TokenSource.parse(f"{tmp_path}:")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.safetensors", "folder"])
def test_what_the_system_refuses_is_named(name: str, tmp_path: Path, monkeypatch):
    """As for a file of another user."""
    if name in ("a.parquet", "a.arrow"):
        pytest.importorskip("pyarrow")
    folder_of(tmp_path, {"folder/a.txt": b"the fox"} if name == "folder" else {name: b"the fox"})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("os.walk", refuse)
    with pytest.raises(MspError, match=r"cannot be read.* Permission denied") as error:
        TokenSource.parse(str(tmp_path / name)).check()
    assert name in str(error.value)
