"""Text sources: what a description means, and the tokens that are read from it."""

from __future__ import annotations

import gzip
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from texts import VOCABULARY, byte_tokenizer, random_text

import msp
from msp import evaluate
from msp.errors import MspError, UsageError
from msp.text.text_sources import _encode as encode
from msp.text.token_sets import TokenSource, save_tokens


@pytest.mark.parametrize(
    ("spec", "kind", "location", "column", "config", "split"),
    [
        ("a/b.txt", "file", "a/b.txt", "text", None, ""),
        ("notes.md", "file", "notes.md", "text", None, ""),
        ("a.jsonl", "file", "a.jsonl", "text", None, ""),
        ("C:/x/a.jsonl:body", "file", "C:/x/a.jsonl", "body", None, ""),
        ("a.jsonl:a field", "file", "a.jsonl", "a field", None, ""),
        ("A.JSONL:meta.body", "file", "A.JSONL", "meta.body", None, ""),
        ("a.jsonl:a:b", "file", "a.jsonl", "a:b", None, ""),
        ("a:b.JSON.GZ:body", "file", "a:b.JSON.GZ", "body", None, ""),
        ("C:/x/a.ndjson", "file", "C:/x/a.ndjson", "text", None, ""),
        ("a.parquet:body", "file", "a.parquet", "body", None, ""),
        ("C:/notes:today.txt", "file", "C:/notes:today.txt", "text", None, ""),
        ("T.SafeTensors", "tokens", "T.SafeTensors", "text", None, ""),
        ("t.safetensors", "tokens", "t.safetensors", "text", None, ""),
        ("hub:me/set:train:body", "hub", "me/set", "body", None, "train"),
        ("hub:me/set:en:train:body", "hub", "me/set", "body", "en", "train"),
        ("hub-joined:set:raw:test:text", "hub-joined", "set", "text", "raw", "test"),
    ],
)
def test_sources_parse(spec, kind, location, column, config, split):
    source = TokenSource.parse(spec)
    assert (source.spec, source.kind, source.location) == (spec, kind, location)
    assert (source.column, source.config, source.split) == (column, config, split)


@pytest.mark.parametrize(
    "spec", ["", "  ", "hub:set", "hub:set:train", "hub::train:text", "hub:a:b:c:d:e", "a.jsonl:", "a.csv.gz:"]
)
def test_malformed_sources_are_wrong_usage(spec):
    with pytest.raises(UsageError):
        TokenSource.parse(spec)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bos", [True, False])
def test_text_is_one_string(tmp_path: Path, seed: int, bos: bool):
    text, tokenizer = random_text(seed, 400), byte_tokenizer(bos=bos)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = TokenSource.parse(str(path)).read(tokenizer, VOCABULARY)
    assert found.dtype == torch.int64
    assert found.tolist() == tokenizer(text)["input_ids"]
    assert int((found == tokenizer.convert_tokens_to_ids("<s>")).sum()) == int(bos)


@pytest.mark.parametrize("limit", [1, 7, 100, 5_000, 10**6])
def test_a_limit_gives_the_same_first_tokens_and_reads_no_more_than_it_needs(tmp_path: Path, limit: int, monkeypatch):
    monkeypatch.setattr("msp.text.text_files._CHUNK_BYTES", 997)  # splits characters of several bytes, too
    text, tokenizer = random_text(limit, 3_000), byte_tokenizer()
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    whole = tokenizer(text)["input_ids"]
    lengths: list[int] = []

    def watched(tokenizer, text, **options):
        lengths.append(len(text))
        return encode(tokenizer, text, **options)

    monkeypatch.setattr("msp.text.text_sources._encode", watched)
    found = TokenSource.parse(str(path)).read(tokenizer, VOCABULARY, limit)
    assert found.tolist() == whole[:limit]
    if limit <= 100:
        assert max(lengths) < len(text) / 2


def test_a_limit_does_not_look_at_what_lies_behind_it(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"the fox " * 400_000 + b"\xff")
    assert len(TokenSource.parse(str(path)).read(byte_tokenizer(), VOCABULARY, 50)) == 50


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfthe fox")
    tokenizer = byte_tokenizer()
    assert TokenSource.parse(str(path)).read(tokenizer, VOCABULARY).tolist() == tokenizer("the fox")["input_ids"]


def test_text_longer_than_the_context_does_not_warn(tmp_path: Path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("the fox " * 100)
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        TokenSource.parse(str(path)).read(byte_tokenizer(), VOCABULARY)
        assert "longer than" not in caplog.text
        byte_tokenizer()("the fox " * 100)
        assert "longer than" in caplog.text, "the tokenizer would have warned"
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity(before)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("field", ["text", "body of it"])
def test_json_lines_are_documents(tmp_path: Path, bos: bool, eos: bool, field: str):
    tokenizer = byte_tokenizer(bos=bos, eos=eos)
    documents = [random_text(index, 5 + index % 7) for index in range(300)]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": index, field: text}) for index, text in enumerate(documents)]
    path.write_text("\n\n".join(lines) + "\n")
    expected: list[int] = []
    for text in documents:
        if text.strip():
            expected += [tokenizer.convert_tokens_to_ids("<s>" if bos else "</s>")] if bos or eos else []
            expected += tokenizer(text, add_special_tokens=False)["input_ids"]
    source = TokenSource.parse(f"{path}:{field}")
    assert source.read(tokenizer, VOCABULARY).tolist() == expected
    assert source.read(tokenizer, VOCABULARY, 1000).tolist() == expected[:1000]


def test_reading_json_lines_stops_at_the_limit(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "the fox"}) + "\n" for _ in range(500)) + "not json\n")
    assert len(TokenSource.parse(f"{path}").read(byte_tokenizer(), VOCABULARY, 100)) == 100
    with pytest.raises(MspError, match="line 501 is not JSON"):
        TokenSource.parse(f"{path}").read(byte_tokenizer(), VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(60,), (6, 10)])
def test_saved_tokens(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    tokens = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    path = tmp_path / "t.safetensors"
    save_file({"anything": tokens}, path)
    source = TokenSource.parse(str(path))
    assert source.read(None, 100).tolist() == tokens.flatten().tolist()
    assert source.read(None, 100, limit=13).tolist() == tokens.flatten().tolist()[:13]


def test_save_tokens_round_trip(tmp_path: Path):
    save_tokens([3, 1, 4, 1, 5], tmp_path / "t.safetensors")
    assert TokenSource.parse(str(tmp_path / "t.safetensors")).read(None, 6).tolist() == [3, 1, 4, 1, 5]


@pytest.fixture
def hub_set(tmp_path: Path) -> tuple[str, list[str]]:
    """A data set the datasets library reads from a directory as it would from the hub."""
    pytest.importorskip("datasets")
    rows = [random_text(index, 20) if index % 3 else "" for index in range(40)]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": row, "number": 1}) + "\n" for row in rows))
    return str(folder), rows


def test_hub_rows_are_documents_or_one_text(hub_set):
    folder, rows = hub_set
    tokenizer = byte_tokenizer()
    documents = [tokenizer(row)["input_ids"] for row in rows if row.strip()]
    expected = [token for document in documents for token in document]
    assert TokenSource.parse(f"hub:{folder}:train:text").read(tokenizer, VOCABULARY).tolist() == expected
    joined = TokenSource.parse(f"hub-joined:{folder}:train:text").read(tokenizer, VOCABULARY)
    assert joined.tolist() == tokenizer("\n\n".join(rows))["input_ids"]


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("train:body", "row 0 has no field 'body'; it has 'text', 'number'"),
        ("train:number", "row 0: field 'number' holds int"),
        ("test:text", "the data set cannot be read"),
    ],
)
def test_hub_errors_name_the_source(hub_set, tail: str, message: str):
    with pytest.raises(MspError, match=message) as error:
        TokenSource.parse(f"hub:{hub_set[0]}:{tail}").read(byte_tokenizer(), VOCABULARY)
    assert hub_set[0] in str(error.value)


def test_without_the_datasets_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MspError, match=r"mixed-sparsity-pruning\[hub\]"):
        TokenSource.parse("hub:a:train:text").check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"good \xc3\xa9 " * 9 + b"\xffbad", r"byte 72 \(0xff\)"),
        ("a.txt", b"cut off \xe2\x82", r"byte 8 \(0xe2\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3 has no field 'text'; it has 'body'"),
        ("a.jsonl", b"[1]\n", "record 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' holds int"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 is not UTF-8 text: byte 24 \(0xff\)"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.safetensors", b"not at all a safetensors file", "cannot be read as safetensors"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str, monkeypatch):
    monkeypatch.setattr("msp.text.text_files._CHUNK_BYTES", 5)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MspError, match=message) as error:
        TokenSource.parse(str(tmp_path / name)).read(byte_tokenizer(), VOCABULARY)
    assert name in str(error.value)


def test_missing_files_and_directories_are_named(tmp_path: Path):
    with pytest.raises(MspError, match="no such file"):
        TokenSource.parse(str(tmp_path / "none.txt")).check()
    with pytest.raises(MspError, match="is a folder without data files"):
        TokenSource.parse(str(tmp_path)).check()


def test_bad_saved_tokens(tmp_path: Path):
    path = tmp_path / "t.safetensors"
    for tensors, message in [
        ({"a": torch.ones(3)}, "'a' is F32"),
        ({"a": torch.ones(3, dtype=torch.bool)}, "'a' is BOOL"),
        ({"a": torch.arange(3), "b": torch.arange(3)}, "holds 2 tensors"),
        ({"a": torch.tensor([1, -2])}, "negative token -2"),
        ({"a": torch.tensor([1, 70, 64])}, "token 70, but the model's vocabulary ends at 63"),
    ]:
        save_file(tensors, path)
        with pytest.raises(MspError, match=message):
            TokenSource.parse(str(path)).read(None, 64)


def test_a_tokenizer_of_another_model_is_found_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the fox")
    with pytest.raises(MspError, match="belong to another model"):
        TokenSource.parse(str(tmp_path / "a.txt")).read(byte_tokenizer(), 100)


def test_text_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the fox")
    with pytest.raises(MspError, match="no tokenizer"):
        TokenSource.parse(str(tmp_path / "a.txt")).read(None, 100)


@pytest.mark.parametrize("seed", range(3))
def test_utf8_offsets_are_exact(tmp_path: Path, seed: int, monkeypatch):
    """The byte named is the one that was broken, wherever chunks happen to end."""
    rng = random.Random(seed)
    monkeypatch.setattr("msp.text.text_files._CHUNK_BYTES", rng.randint(1, 9))
    good = "".join(rng.choices(string.ascii_letters + "é東😀", k=80)).encode()
    (tmp_path / "a.txt").write_bytes(good + b"\xfe" + good)
    with pytest.raises(MspError, match=rf"byte {len(good)} \(0xfe\)"):
        TokenSource.parse(str(tmp_path / "a.txt")).read(byte_tokenizer(), VOCABULARY)


def test_the_same_text_in_whatever_form(tmp_path: Path):
    for name in ("set/train.jsonl", "set/test.jsonl", "one/a.jsonl", "one/b.jsonl", "notes/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": "the fox"}))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "one" / "a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "one" / "a.jsonl")

    def same(left: str, right: str) -> bool:
        one, other = (TokenSource.parse(source.replace("~", str(tmp_path))) for source in (left, right))
        assert one.same_text(one) and other.same_text(other)
        assert one.same_text(other) == other.same_text(one)
        return one.same_text(other)

    for left, right in [
        ("~/one/a.jsonl", "~/one/a.jsonl:meta.body"),
        ("~/one/a.jsonl", "~/set/../one/a.jsonl:body"),
        ("~/one/a.jsonl", "~/link.jsonl"),
        ("~/one/a.jsonl:body", "~/hard.jsonl:text"),
        ("~/one", "~/one/b.jsonl"),
        ("~/one:text", "~/one/:body"),
        ("hub:~/set:train:text", "~/set/train.jsonl:body"),
        ("hub:~/set:train:text", "hub-joined:~/set/../set:default:train:body"),
        ("hub:~/set:train+test:text", "hub:~/set:test:text"),
        ("hub:~/one:train:text", "~/one/b.jsonl"),
        ("hub:~/one:train:text", "~/one"),
        ("hub:me/set:train:text", "hub-joined:me/set:train:body"),
    ]:
        assert same(left, right), (left, right)
    for left, right in [
        ("~/one/a.jsonl", "~/one/b.jsonl"),
        ("~/one", "~/notes"),
        ("~/set/train.jsonl", "~/set/test.jsonl"),
        ("hub:~/set:train:text", "~/set/test.jsonl"),
        ("hub:~/set:train:text", "hub:~/set:test:text"),
        ("hub:~/set:train:text", "~/one/a.jsonl"),
        ("hub:me/set:train:text", "hub:me/set:other:train:text"),
        ("hub:me/set:train:text", "hub:me/other:train:text"),
        ("hub:me/set:train:text", "~/set/train.jsonl"),
    ]:
        assert not same(left, right), (left, right)


def test_a_hub_stream_that_breaks_names_the_row(tmp_path: Path):
    """The second shard is cut off in the middle."""
    pytest.importorskip("datasets")
    whole = gzip.compress("\n".join(json.dumps({"text": random_text(seed, 20)}) for seed in range(50)).encode())
    (tmp_path / "train-0.jsonl.gz").write_bytes(whole)
    (tmp_path / "train-1.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for kind in ("hub", "hub-joined"):
        source = f"{kind}:{tmp_path}:train:text"
        TokenSource.parse(source).check()
        with pytest.raises(MspError, match=r"the data set breaks off after \d+ rows: ") as error:
            TokenSource.parse(source).read(byte_tokenizer(), VOCABULARY)
        assert str(error.value).startswith(source)
        assert 50 <= int(str(error.value).partition("after ")[2].split()[0]) < 100


@pytest.mark.parametrize("cut", ["dropped", "timed out"])
def test_a_connection_that_is_lost_is_named(cut: str, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def stream(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield from ({"text": "the fox"} for _ in range(7))
        raise {"dropped": ConnectionResetError, "timed out": TimeoutError}[cut](f"{cut}\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    with pytest.raises(MspError, match=f"^hub:me/set:train:text: the data set breaks off after 7 rows: {cut}$"):
        TokenSource.parse("hub:me/set:train:text").read(byte_tokenizer(), VOCABULARY)


@pytest.mark.parametrize("option", ["calibration", "evaluate"])
def test_the_api_looks_at_sources_before_it_loads_the_model(option: str, tmp_path: Path):
    (tmp_path / "good.txt").write_text("the fox")
    (tmp_path / "a.json").write_text('[{"body": "the fox"}]')
    sources = {"calibration": str(tmp_path / "good.txt"), option: str(tmp_path / "a.json")}
    with pytest.raises(MspError, match=r"record 1 has no field 'text'; it has 'body'"):
        msp.prune(str(tmp_path / "no model"), sparsity=0.5, output=tmp_path / "out", **sources)
    with pytest.raises(MspError, match=r"record 1 has no field 'text'; it has 'body'"):
        evaluate(str(tmp_path / "no model"), evaluate=str(tmp_path / "a.json"))
