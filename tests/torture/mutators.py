"""Changes to the bytes of a file and to what JSON and YAML hold, drawn by a ``random.Random``."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Bytes = Callable[[bytes, random.Random], bytes]

TOKENS = [
    b"[" * 5000, b"{" * 70, b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"\xff\xfe", b"\0", b"\0" * 64,
    b'"\\ud800"', b"\xef\xbb\xbf", b"&a [*a]", b"!!python/object/apply:os.system [ls]", b"<<: *x", b'"', b"\n",
    b"\r", b",,,", b"\x1f\x8b", b"PAR1", b"\xf0\x9f\x98\x80",
]  # fmt: skip
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 31) - 1, (1 << 63) - 1, (1 << 64) - 1, 1 << 40]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 5, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 1.5, 1e308, 5e-324, -0.0,
    float("nan"), float("inf"), -float("inf"), "", "x", "2:8", "9:8", "0:0", "8:0", "1" * 5000, "２:8", "../x",
    "/etc/passwd", "a\0b", "é" * 90, "\ud800", "nan", "dense", [], [1], [[[]]], {}, {"a": 1}, {"": {}}, [None] * 50,
    "(a+)+$", "re:(", "float16", "model.safetensors",
]  # fmt: skip


def flip(data: bytes, choose: random.Random) -> bytes:
    """One to four bits."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, choose: random.Random) -> bytes:
    at = choose.randrange(len(data))
    put = choose.randbytes(choose.randint(1, 8))
    return data[:at] + put + data[at + len(put) :]


def insert(data: bytes, choose: random.Random) -> bytes:
    at = choose.randint(0, len(data))
    return data[:at] + choose.randbytes(choose.randint(1, 9)) + data[at:]


def delete(data: bytes, choose: random.Random) -> bytes:
    at = choose.randrange(len(data))
    return data[:at] + data[at + choose.randint(1, 16) :]


def duplicate(data: bytes, choose: random.Random) -> bytes:
    start, stop = sorted(choose.randint(0, len(data)) for _ in range(2))
    return data[:stop] + data[start:stop] + data[stop:]


def truncate(data: bytes, choose: random.Random) -> bytes:
    return data[: choose.randrange(len(data))]


def swap(data: bytes, choose: random.Random) -> bytes:
    """Two ranges of equal length."""
    size = choose.randint(1, max(1, len(data) // 4))
    one, other = sorted(choose.randint(0, max(0, len(data) - size)) for _ in range(2))
    changed = bytearray(data)
    changed[one : one + size], changed[other : other + size] = data[other : other + size], data[one : one + size]
    return bytes(changed)


def blank(data: bytes, choose: random.Random) -> bytes:
    """A range of zeros, as a disk leaves it."""
    start, stop = sorted(choose.randint(0, len(data)) for _ in range(2))
    return data[:start] + b"\0" * (stop - start) + data[stop:]


def token(data: bytes, choose: random.Random) -> bytes:
    at = choose.randint(0, len(data))
    return data[:at] + choose.choice(TOKENS) + data[at:]


def number(data: bytes, choose: random.Random) -> bytes:
    """A whole number of four or eight bytes, at the beginning more often than elsewhere."""
    at, size = choose.choice([0, 8, choose.randrange(len(data))]), choose.choice([4, 8])
    put = (choose.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return data[:at] + put + data[at + size :]


def append(data: bytes, choose: random.Random) -> bytes:
    return data + choose.choice([choose.randbytes(choose.randint(1, 64)), data, b"\0", b"\n", b" "])


BYTES: list[Bytes] = [
    flip, flip, overwrite, insert, delete, duplicate, truncate, swap, blank, token, number, append,
]  # fmt: skip


def splice(data: bytes, other: bytes, choose: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: choose.randint(0, len(data))] + other[choose.randint(0, len(other)) :]


def damaged(data: bytes, other: bytes, choose: random.Random) -> bytes:
    """One or two changes; ``other`` is another file to splice with."""
    if choose.random() < 0.01:
        return b""
    for _ in range(choose.choice([1, 1, 1, 2])):
        if choose.random() < 0.08:
            data = splice(data, other, choose)
        elif data:
            data = choose.choice(BYTES)(data, choose)
    return data


class Twice(dict[str, Any]):
    """An object that is written with a key twice."""

    def items(self) -> Any:
        pairs = list(super().items())
        return [*pairs, pairs[0]] if pairs else pairs


def deep(choose: random.Random) -> Any:
    value: Any = 1
    for _ in range(choose.choice([10, 60, 63, 64, 65, 100])):
        value = [value] if choose.random() < 0.5 else {"a": value}
    return value


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def odd(choose: random.Random) -> Any:
    """A value of its own: what is done to it is not done to the next one."""
    return copy.deepcopy(choose.choice(ODD))


def reshaped(content: Any, choose: random.Random) -> Any:
    """A copy with one or two values replaced, removed, repeated, swapped or under another name."""
    content = copy.deepcopy(content)
    for _ in range(choose.randint(1, 2)):
        everywhere = places(content)
        if not everywhere:
            return odd(choose)
        *way, last = choose.choice(everywhere)
        parent = content
        for key in way:
            parent = parent[key]
        how = choose.randrange(9)
        if how < 3:
            parent[last] = odd(choose)
        elif how == 3:
            del parent[last]
        elif how == 4 and isinstance(parent, dict):
            parent[choose.choice(["", "x", "../x", "__class__", "a.b", str(last) * 2])] = parent.pop(last)
        elif how == 5:
            *other_way, other = choose.choice(everywhere)
            source = content
            try:
                for key in other_way:
                    source = source[key]
                parent[last] = copy.deepcopy(source[other])
            except (KeyError, IndexError, TypeError):
                continue
        elif how == 6 and type(parent[last]) in (int, float):
            parent[last] += choose.choice([-1, 1, 0.5, 1e300, -parent[last]])
        elif how == 7:
            parent[last] = deep(choose)
        elif isinstance(parent, dict) and way:
            *outer, name = way
            owner = content
            for key in outer:
                owner = owner[key]
            owner[name] = Twice(parent)
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
    return content


def as_json(content: Any) -> bytes:
    """With what Python writes and JSON has not: NaN, keys twice, numbers of any length."""

    def write(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(str(key))}: {write(item)}" for key, item in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(write, value)) + "]"
        if type(value) is int and abs(value) > 10**300:
            return f"{'-' * (value < 0)}1{'0' * 400}"
        return json.dumps(value)

    return write(content).encode()
