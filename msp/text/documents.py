"""Documents: the text of a record's field, or its chat as the tokenizer's template writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from msp.errors import MspError, first_line
from msp.text.text_files import Record

CHAT_FIELDS = ("messages", "conversations")
# The roles in ShareGPT's records, and the usual names for them.
_ROLES = {"human": "user", "gpt": "assistant"}
_SHOWN_FIELDS = 20


class Document(NamedTuple):
    """One text and its place; ``is_chat`` if a template wrote it, with all special tokens."""

    where: str
    text: str
    is_chat: bool = False


def find_field(record: Mapping[str, Any], field: str) -> Any:
    """The value at ``field``: a key, or keys of nested records joined by dots; the longest matching key counts.

    Raises:
        KeyError: there is no such field.
    """
    if field in record:
        return record[field]
    dot = field.rfind(".")
    while dot > 0:
        inner = record.get(field[:dot])
        if isinstance(inner, Mapping):
            try:
                return find_field(inner, field[dot + 1 :])
            except KeyError:
                pass
        dot = field.rfind(".", 0, dot)
    raise KeyError(field)


def text_or_chat(record: Record, field: str) -> str | list[dict[str, Any]]:
    """The text at ``field``, or the messages of the chat there, each with ``role`` and ``content``.

    Raises:
        MspError: no such field, another type, or a malformed message; names the record.
    """
    where, value = record
    if not isinstance(value, Mapping):
        raise MspError(f"{where} is not a JSON object but {type(value).__name__}")
    try:
        found = find_field(value, field)
    except KeyError:
        names = _field_names(value)
        chats = [name for name in CHAT_FIELDS if _is_chat(value.get(name))]
        hint = f"; {chats[0]!r} is a chat: name it as the field to read it" if chats else ""
        raise MspError(f"{where} has no field {field!r}; it has {', '.join(names) or 'none'}{hint}") from None
    if isinstance(found, str):
        return found
    if _is_chat(found):
        return [_message(item, f"{where}, message {number} of {field!r}") for number, item in enumerate(found, 1)]
    what = "an empty list" if found == [] else "null" if found is None else type(found).__name__
    raise MspError(f"{where}: field {field!r} holds {what}, not text or a chat")


def documents(records: Iterator[Record], field: str, tokenizer: Any) -> Iterator[Document]:
    """The documents in ``field`` of each record; chats pass through ``tokenizer.apply_chat_template``.

    Raises:
        MspError: all errors of ``text_or_chat``; a chat without a template, or a template that refuses the chat.
    """
    for record in records:
        found = text_or_chat(record, field)
        if isinstance(found, str):
            yield Document(record.where, found)
            continue
        if not getattr(tokenizer, "chat_template", None):
            raise MspError(
                f"{record.where}: field {field!r} holds a chat, but the model's tokenizer has no chat template "
                "to write it with: name a field of text, or add the template"
            )
        try:
            text = tokenizer.apply_chat_template(found, tokenize=False)
        except Exception as error:  # a template is a program and may raise any kind
            raise MspError(f"{record.where}: the chat template refuses the chat: {first_line(error)}") from error
        yield Document(record.where, text, is_chat=True)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    # Columnar files write every key that any message has, with null for the keys that this message lacks.
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        message["role"] = _ROLES.get(str(speaker), speaker)
        if "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise MspError(f"{where} has no role; it has {', '.join(map(repr, message)) or 'nothing'}")
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list):
        # Many templates would write the list itself, as Python shows it.
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise MspError(f"{where} has no text as its content; it has {', '.join(map(repr, message))}")
    return {**message, "content": content}


def _field_names(record: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields, quoted, those of nested records with dots; not more than a message can show."""
    names: list[str] = []
    for key, value in record.items():
        inner = _field_names(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else []
        names += inner or [repr(f"{prefix}{key}")]
    return [*names[:_SHOWN_FIELDS], "..."] if not prefix and len(names) > _SHOWN_FIELDS else names
