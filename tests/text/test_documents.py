"""Fields of records, nested ones, and chats that the tokenizer's template writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import shared
from hypothesis import given
from hypothesis import strategies as st
from texts import VOCABULARY, byte_tokenizer, random_text

from msp.errors import MspError
from msp.text.documents import find_field
from msp.text.token_sets import TokenSource

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'narrator' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ message.role }}{% if message.name is defined %} {{ message.name }}{% endif %}>{{ message.content }}</s>"
    "{% endfor %}"
)


def chatting_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chats(count: int) -> list[list[dict[str, Any]]]:
    roles = ["system", "user", "assistant"]
    return [
        [{"role": role, "content": random_text(3 * i + j, 9)} for j, role in enumerate(roles)] for i in range(count)
    ]


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    return path


def read(source: str, tokenizer: Any = None, limit: int | None = None) -> list[int]:
    found: list[int] = TokenSource.parse(source).read(tokenizer or chatting_tokenizer(), VOCABULARY, limit).tolist()
    return found


def written(found: list[list[dict[str, Any]]]) -> list[int]:
    """What transformers itself makes of the chats."""
    tokenizer = chatting_tokenizer()
    return [token for chat in found for token in tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]]


def test_find_field():
    record = {
        "text": "a",
        "meta": {"text": "b", "x.y": "c", "in": {"z": 0}},
        "meta.in": {"w": 1, "z": 2},
        "n.": {"": 5},
    }
    for field, value in {
        "text": "a",
        "meta.text": "b",
        "meta.x.y": "c",
        "meta.in.z": 2,
        "meta.in.w": 1,
        "meta.in": {"w": 1, "z": 2},
    }.items():
        assert find_field(record, field) == value
    del record["meta.in"]
    assert find_field(record, "meta.in.z") == 0
    for field in ("body", "text.body", "meta.", ".text", "meta.text.x", "meta.in.y", "."):
        with pytest.raises(KeyError):
            find_field(record, field)


KEYS = st.text("ab.", min_size=1, max_size=3)


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=9))
def test_every_value_is_found_under_its_path(record: Any):
    """Or another one whose path reads the same."""

    def paths(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, inner in value.items():
            yield f"{prefix}{key}", inner
            if isinstance(inner, dict):
                yield from paths(inner, f"{prefix}{key}.")

    if isinstance(record, dict):
        found = list(paths(record, ""))
        for path, _ in found:
            assert find_field(record, path) in [value for other, value in found if other == path]
            if path in record:
                assert find_field(record, path) is record[path]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_nested_fields(name: str, tmp_path: Path):
    texts = [random_text(seed, 9) for seed in range(5)]
    nested = write(tmp_path / name, [{"id": 1, "meta": {"body": {"en": text}, "n": 2}} for text in texts])
    plain = write(tmp_path / "plain.jsonl", [{"text": text} for text in texts])
    assert read(f"{nested}:meta.body.en") == read(str(plain))
    with pytest.raises(MspError, match=r"has no field 'meta.text'; it has 'id', 'meta.body.en', 'meta.n'$"):
        TokenSource.parse(f"{nested}:meta.text").check()
    with pytest.raises(MspError, match=r"field 'meta\.body' holds dict, not text"):
        TokenSource.parse(f"{nested}:meta.body").check()
    dotted = write(tmp_path / f"dotted-{name}", [{"meta.body": text, "meta": {"body": "no"}} for text in texts])
    assert read(f"{dotted}:meta.body") == read(str(plain))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("field", ["messages", "conversations", "of.it"])
def test_a_chat_is_what_the_template_writes(name: str, field: str, tmp_path: Path):
    found = chats(200)
    found[3][1]["name"] = "ada"  # which a columnar file turns into null everywhere else
    records = [{"it": 1, field: chat} if "." not in field else {"of": {"it": chat}} for chat in found]
    path = write(tmp_path / name, records)
    assert read(f"{path}:{field}") == written(found)
    assert read(f"{path}:{field}", limit=100) == written(found)[:100]


def test_other_ways_to_write_a_chat(tmp_path: Path):
    found = chats(3)
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    shared_gpt = [[{"from": speakers[m["role"]], "value": m["content"]} for m in chat] for chat in found]
    parts = [
        [
            {
                "role": m["role"],
                "content": [{"type": "text", "text": part} for part in (m["content"][:5], m["content"][5:])],
            }
            for m in chat
        ]
        for chat in found
    ]
    for same in (shared_gpt, parts):
        path = write(tmp_path / "a.jsonl", [{"conversations": chat} for chat in same])
        assert read(f"{path}:conversations") == written(found)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    path = write(tmp_path / "a.jsonl", [{"messages": [call]}])
    assert read(f"{path}:messages") == written([[{**call, "content": ""}]])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"content": "a"}], "line 2, message 1 of 'messages' has no role; it has 'content'"),
        (
            [{"role": "user", "content": "a"}, {"role": "user"}],
            "line 2, message 2 of 'messages' has no text as its content",
        ),
        ([{"role": "user", "content": None}], "message 1 of 'messages' has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 of 'messages' has no text"),
        ([{"role": "user", "content": [{"type": "image", "text": None}]}], "message 1 of 'messages' has no text"),
        ([{"from": ["human"], "value": "a"}], "has no role"),
        ([{}], "has no role; it has nothing"),
        (["a"], "line 2: field 'messages' holds list, not text or a chat"),
        ([], "line 2: field 'messages' holds an empty list"),
        ([{"role": "narrator", "content": "a"}], "line 2: the chat template refuses the chat: no such role"),
    ],
)
def test_bad_chats_are_named(messages: list[Any], message: str, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"messages": chats(1)[0]}, {"messages": messages}])
    with pytest.raises(MspError, match=message) as error:
        read(f"{path}:messages")
    assert "a.jsonl" in str(error.value)


def test_a_chat_needs_a_template(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"messages": chats(1)[0]}])
    with pytest.raises(MspError, match=r"a\.jsonl, line 1: field 'messages' holds a chat, .* no chat template"):
        read(f"{path}:messages", byte_tokenizer())


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_chat_beside_the_missing_field_is_pointed_at(field: str, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"id": 1, field: chats(1)[0]}])
    with pytest.raises(MspError, match=f"has no field 'text'; it has 'id', '{field}'; '{field}' is a chat: name it"):
        TokenSource.parse(str(path)).check()


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_hub_rows_have_chats_and_nested_columns(name: str, tmp_path: Path):
    pytest.importorskip("datasets")
    found = chats(20)
    write(tmp_path / name, [{"messages": chat, "meta": {"body": chat[0]["content"]}} for chat in found])
    plain = write(tmp_path.parent / f"{tmp_path.name}.jsonl", [{"text": chat[0]["content"]} for chat in found])
    assert read(f"hub:{tmp_path}:train:messages") == written(found)
    assert read(f"hub:{tmp_path}:train:meta.body") == read(str(plain))
    with pytest.raises(MspError, match=r"row 0 holds a chat, and chats are not joined"):
        read(f"hub-joined:{tmp_path}:train:messages")
    with pytest.raises(MspError, match=r"row 0 has no field 'text'; .*'messages' is a chat"):
        TokenSource.parse(f"hub:{tmp_path}:train:text").check()


def test_a_document_that_the_tokenizer_refuses_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the fox"}\n' * 40 + '{"text": "half a pair: \\ud800"}\n' + '{"text": "the fox"}\n' * 40)
    with pytest.raises(MspError, match=r"a\.jsonl, line 41: the tokenizer refuses the text: "):
        read(str(path))


def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the fox")

    class Refusing:
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("no\nsuch word")

    with pytest.raises(MspError, match=r"a\.txt: the tokenizer refuses the text: no$"):
        TokenSource.parse(str(tmp_path / "a.txt")).read(Refusing(), 9)


def test_the_records_of_a_real_data_set():
    passages = shared("data", "zeroshot", "arc_easy.validation.jsonl")
    assert len(read(f"{passages}:question", limit=500)) == 500
    with pytest.raises(MspError, match=r"line 1: field 'choices\.text' holds list"):
        TokenSource.parse(f"{passages}:choices.text").check()
