"""Token sources and the three-way split."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from msp.data import POOL_FACTOR, TokenSource, make_token_sets, noised, read_windows, save_tokens, token_windows
from msp.data import _encode as encode
from msp.errors import MspError, UsageError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "naïve", "東京", "\n"]


def make_tokenizer(*, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, so that the number of characters a token varies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("q", "u"), ("o", "v"), ("ov", "e"), ("ove", "r")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    names = {key: token for key, token, on in (("bos_token", "<s>", bos), ("eos_token", "</s>", eos)) if on}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)


def random_text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


VOCABULARY = len(make_tokenizer())


@pytest.mark.parametrize(
    ("spec", "kind", "location", "column", "config", "split"),
    [
        ("a/b.txt", "text", "a/b.txt", "text", None, ""),
        ("notes.md", "text", "notes.md", "text", None, ""),
        ("a.jsonl", "jsonl", "a.jsonl", "text", None, ""),
        ("C:/x/a.jsonl:body", "jsonl", "C:/x/a.jsonl", "body", None, ""),
        ("a.jsonl:a field", "jsonl", "a.jsonl", "a field", None, ""),
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


@pytest.mark.parametrize("spec", ["", "  ", "hub:set", "hub:set:train", "hub::train:text", "hub:a:b:c:d:e", "a.jsonl:"])
def test_malformed_sources_are_wrong_usage(spec):
    with pytest.raises(UsageError):
        TokenSource.parse(spec)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bos", [True, False])
def test_text_is_one_string(tmp_path: Path, seed: int, bos: bool):
    text, tokenizer = random_text(seed, 400), make_tokenizer(bos=bos)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = TokenSource.parse(str(path)).read(tokenizer, VOCABULARY)
    assert found.dtype == torch.int64
    assert found.tolist() == tokenizer(text)["input_ids"]
    assert int((found == tokenizer.convert_tokens_to_ids("<s>")).sum()) == int(bos)


@pytest.mark.parametrize("limit", [1, 7, 100, 5_000, 10**6])
def test_a_limit_gives_the_same_first_tokens_and_reads_no_more_than_it_needs(tmp_path: Path, limit: int, monkeypatch):
    monkeypatch.setattr("msp.data._CHUNK_BYTES", 997)  # splits characters of several bytes, too
    text, tokenizer = random_text(limit, 3_000), make_tokenizer()
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    whole = tokenizer(text)["input_ids"]
    lengths: list[int] = []

    def watched(tokenizer, text, **options):
        lengths.append(len(text))
        return encode(tokenizer, text, **options)

    monkeypatch.setattr("msp.data._encode", watched)
    found = TokenSource.parse(str(path)).read(tokenizer, VOCABULARY, limit)
    assert found.tolist() == whole[:limit]
    if limit <= 100:
        assert max(lengths) < len(text) / 2


def test_a_limit_does_not_look_at_what_lies_behind_it(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"the fox " * 400_000 + b"\xff")
    assert len(TokenSource.parse(str(path)).read(make_tokenizer(), VOCABULARY, 50)) == 50


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfthe fox")
    tokenizer = make_tokenizer()
    assert TokenSource.parse(str(path)).read(tokenizer, VOCABULARY).tolist() == tokenizer("the fox")["input_ids"]


def test_text_longer_than_the_context_does_not_warn(tmp_path: Path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("the fox " * 100)
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        TokenSource.parse(str(path)).read(make_tokenizer(), VOCABULARY)
        assert "longer than" not in caplog.text
        make_tokenizer()("the fox " * 100)
        assert "longer than" in caplog.text, "the tokenizer would have warned"
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity(before)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("field", ["text", "body of it"])
def test_json_lines_are_documents(tmp_path: Path, bos: bool, eos: bool, field: str):
    tokenizer = make_tokenizer(bos=bos, eos=eos)
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
    assert len(TokenSource.parse(f"{path}").read(make_tokenizer(), VOCABULARY, 100)) == 100
    with pytest.raises(MspError, match="line 501 is not JSON"):
        TokenSource.parse(f"{path}").read(make_tokenizer(), VOCABULARY)


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
    tokenizer = make_tokenizer()
    documents = [tokenizer(row)["input_ids"] for row in rows if row.strip()]
    expected = [token for document in documents for token in document]
    assert TokenSource.parse(f"hub:{folder}:train:text").read(tokenizer, VOCABULARY).tolist() == expected
    joined = TokenSource.parse(f"hub-joined:{folder}:train:text").read(tokenizer, VOCABULARY)
    assert joined.tolist() == tokenizer("\n\n".join(rows))["input_ids"]


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("train:body", "no column 'body'"),
        ("train:number", "row 0 holds int"),
        ("test:text", "cannot read the data set"),
    ],
)
def test_hub_errors_name_the_source(hub_set, tail: str, message: str):
    with pytest.raises(MspError, match=message) as error:
        TokenSource.parse(f"hub:{hub_set[0]}:{tail}").read(make_tokenizer(), VOCABULARY)
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
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' holds int"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 is not UTF-8 text: byte 24 \(0xff\)"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.safetensors", b"not at all a safetensors file", "cannot be read as safetensors"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str, monkeypatch):
    monkeypatch.setattr("msp.data._CHUNK_BYTES", 5)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MspError, match=message) as error:
        TokenSource.parse(str(tmp_path / name)).read(make_tokenizer(), VOCABULARY)
    assert name in str(error.value)


def test_missing_files_and_directories_are_named(tmp_path: Path):
    with pytest.raises(MspError, match="no such file"):
        TokenSource.parse(str(tmp_path / "none.txt")).check()
    with pytest.raises(MspError, match="is a directory"):
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
        TokenSource.parse(str(tmp_path / "a.txt")).read(make_tokenizer(), 100)


def test_text_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the fox")
    with pytest.raises(MspError, match="no tokenizer"):
        TokenSource.parse(str(tmp_path / "a.txt")).read(None, 100)


def test_windows():
    assert token_windows(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert token_windows(torch.arange(2), 3).shape == (0, 3)
    with pytest.raises(UsageError, match="least is 2"):
        token_windows(torch.arange(4), 1)


def test_read_windows(tmp_path: Path):
    path = str(tmp_path / "t.safetensors")
    save_tokens(range(100), path)
    assert read_windows(path, None, 100, window=7).shape == (14, 7)
    assert read_windows(path, None, 100, window=7, tokens=30).shape == (4, 7)
    assert read_windows(path, None, 100, window=7, tokens=3).shape == (1, 7)
    with pytest.raises(MspError, match="100 tokens found, 101 needed"):
        read_windows(path, None, 100, window=101)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> tuple[str, str]:
    """Two sources in which every token occurs once, so that a token tells where it came from."""
    folder = tmp_path_factory.mktemp("numbered")
    save_tokens(range(4_000), folder / "a.safetensors")
    save_tokens(range(10_000, 11_000), folder / "b.safetensors")
    return str(folder / "a.safetensors"), str(folder / "b.safetensors")


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(2, 40),
    calibration=st.integers(0, 900),
    fitness=st.integers(0, 900),
    test=st.integers(0, 900),
    seed=st.integers(0, 2**40),
    other=st.booleans(),
)
def test_no_token_is_in_two_sets(numbered, window, calibration, fitness, test, seed, other):
    options = {"calibration_tokens": calibration, "fitness_tokens": fitness, "test_tokens": test, "window": window}
    evaluate = numbered[1] if other else None
    sets = make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=seed, **options)
    tokens = [*sets.calibration.flatten().tolist(), *sets.fitness.flatten().tolist(), *sets.test.flatten().tolist()]
    assert len(tokens) == len(set(tokens))
    for windows, wanted in ((sets.calibration, calibration), (sets.fitness, fitness)):
        assert windows.shape == (max(1, wanted // window) if wanted else 0, window)
        assert (windows.diff(dim=1) == 1).all(), "a window is consecutive text"
    assert sets.sources["calibration_tokens"] == sets.calibration.numel()
    again = make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=seed, **options)
    for name in ("calibration", "fitness", "test"):
        assert torch.equal(getattr(again, name), getattr(sets, name))


@pytest.mark.parametrize("other", [True, False])
def test_seeds_change_what_is_drawn_and_never_the_test(numbered, other: bool):
    options = {"window": 10, "calibration_tokens": 200, "fitness_tokens": 100, "test_tokens": 150}
    evaluate = numbered[1] if other else None
    drawn = [make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=s, **options) for s in range(4)]
    assert all(torch.equal(sets.test, drawn[0].test) for sets in drawn)
    assert len({tuple(sets.calibration.flatten().tolist()) for sets in drawn}) == 4
    assert len({tuple(sets.fitness.flatten().tolist()) for sets in drawn}) == 4
    bigger = make_token_sets(numbered[0], None, 20_000, evaluate=evaluate, seed=0, **options | {"fitness_tokens": 900})
    assert torch.equal(bigger.test, drawn[0].test), "nor does asking for more calibration text change it"


def test_noise_replaces_a_share_of_the_fitness_tokens_by_others_of_theirs(numbered):
    options = {"window": 50, "calibration_tokens": 500, "fitness_tokens": 2500, "test_tokens": 500, "seed": 1}
    clean, noisy, again = (
        make_token_sets(numbered[0], None, 20_000, fitness_noise=x, **options) for x in (0, 0.2, 0.2)
    )
    changed = noisy.fitness != clean.fitness
    assert 0.15 < float(changed.float().mean()) < 0.25
    assert not changed[:, 0].any()
    assert set(noisy.fitness.flatten().tolist()) <= set(clean.fitness.flatten().tolist())
    assert torch.equal(noisy.fitness, again.fitness)
    assert torch.equal(noisy.calibration, clean.calibration)
    assert torch.equal(noisy.test, clean.test)
    assert not torch.equal(noised(clean.fitness, 0.2, 2), noisy.fitness)
    assert noisy.sources["fitness_noise"] == 0.2


def test_evaluating_on_the_calibration_text_holds_its_windows_out(numbered):
    source = numbered[0]
    same = str(Path(source).parent / "." / "x" / ".." / Path(source).name)
    options = {"window": 10, "calibration_tokens": 3000, "fitness_tokens": 500, "test_tokens": 500, "seed": 1}
    (Path(source).parent / "x").mkdir(exist_ok=True)
    sets = make_token_sets(source, None, 20_000, evaluate=same, **options)
    everything = torch.cat([sets.calibration.flatten(), sets.fitness.flatten(), sets.test.flatten()])
    assert len(everything.unique()) == 4000
    assert sets.sources["evaluate"].endswith("(held out)")


def test_draws_come_from_a_pool_and_not_just_the_beginning(numbered):
    sets = make_token_sets(
        numbered[0], None, 20_000, window=10, calibration_tokens=100, fitness_tokens=0, test_tokens=0, seed=3
    )
    assert int(sets.calibration.max()) > 200
    assert int(sets.calibration.max()) < POOL_FACTOR * 100
    assert sets.fitness.shape == (0, 10)


def test_too_short_a_text_says_what_was_found_and_needed(numbered):
    with pytest.raises(MspError, match=r"4000 tokens found, 4100 needed \(200 calibration, 200 fitness and 10 test"):
        make_token_sets(
            numbered[0], None, 20_000, window=10, calibration_tokens=2000, fitness_tokens=2000, test_tokens=100, seed=0
        )
    with pytest.raises(MspError, match="1000 tokens found, 2000 needed"):
        make_token_sets(
            numbered[0],
            None,
            20_000,
            evaluate=numbered[1],
            window=2000,
            calibration_tokens=1,
            fitness_tokens=0,
            test_tokens=100,
            seed=0,
        )


def test_wrong_counts_are_wrong_usage(numbered):
    options = {"window": 10, "calibration_tokens": 100, "fitness_tokens": 0, "test_tokens": 100, "seed": 0}
    for change in ({"window": 1}, {"calibration_tokens": -1}, {"fitness_tokens": -5}, {"test_tokens": None}):
        with pytest.raises(UsageError):
            make_token_sets(numbered[0], None, 20_000, **options | change)


def test_the_evaluation_file_is_looked_for_before_anything_is_read(numbered, tmp_path: Path):
    with pytest.raises(MspError, match=r"nowhere\.txt: no such file"):
        make_token_sets(
            numbered[0],
            None,
            1,
            evaluate=str(tmp_path / "nowhere.txt"),
            window=10,
            calibration_tokens=10,
            fitness_tokens=0,
            test_tokens=10,
            seed=0,
        )


@pytest.mark.parametrize("seed", range(3))
def test_utf8_offsets_are_exact(tmp_path: Path, seed: int, monkeypatch):
    """The byte named is the one that was broken, wherever chunks happen to end."""
    rng = random.Random(seed)
    monkeypatch.setattr("msp.data._CHUNK_BYTES", rng.randint(1, 9))
    good = "".join(rng.choices(string.ascii_letters + "é東😀", k=80)).encode()
    (tmp_path / "a.txt").write_bytes(good + b"\xfe" + good)
    with pytest.raises(MspError, match=rf"byte {len(good)} \(0xfe\)"):
        TokenSource.parse(str(tmp_path / "a.txt")).read(make_tokenizer(), VOCABULARY)
