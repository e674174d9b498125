"""The one reader of JSON and YAML. It reads every file exactly, or refuses it with its name.

It refuses files that are too large, nested too deep, or no strict JSON or YAML (a key twice, NaN, a number that no
double or 64-bit integer holds, half a surrogate pair), and YAML whose aliases make it endless or huge. ``text``,
``whole`` and the others take a value out of the content, or name the entry that is not of their type.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from msp.errors import MspError

# A search of thousands of units and candidates writes a tenth of this.
MOST_BYTES = {"JSON": 1 << 30, "YAML": 1 << 25}
# The bytes that are read from a file at a time.
PIECE_BYTES = 1 << 20
DEEPEST = 64
# The most entries of a YAML file; those under an alias count at each of its places.
MOST_NODES = 1 << 22
LARGEST = (1 << 63) - 1
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 80


class _Wrong(ValueError):
    """The content of a file is not allowed."""


def shown(value: object) -> str:
    """A value in an error: its ``repr``, short."""
    try:
        return _shorten.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"


def read_json(path: str | Path, *, foreign: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        foreign: a file that other programs write too, such as a model's ``config.json``: infinite and huge numbers
            are read as Python reads them.

    Raises:
        MspError: the file cannot be read, or is refused; see the module.
    """
    data = _bytes(path, "JSON")
    try:
        return parse_json(data, foreign=foreign)
    except ValueError as error:
        raise MspError(f"{path}: cannot be read: {error}") from error


def read_object(path: str | Path, *, foreign: bool = False) -> dict[str, Any]:
    """``read_json`` of a file that holds an object.

    Raises:
        MspError: as ``read_json``; or it holds no object.
    """
    content = read_json(path, foreign=foreign)
    if not isinstance(content, dict):
        raise MspError(f"{path}: not a JSON object")
    return content


def parse_json(data: bytes, *, foreign: bool = False) -> Any:
    """``read_json`` of bytes; raises ``ValueError``."""
    text = data.decode("utf-8")  # a UnicodeDecodeError is a ValueError
    if _depth(data) > DEEPEST:
        raise _Wrong(f"nested deeper than {DEEPEST}")
    strict: dict[str, Any] = {} if foreign else {"parse_int": _int, "parse_float": _float, "parse_constant": _refuse}
    content = json.loads(text, object_pairs_hook=_unique, **strict)
    if re.search(rb"\\[uU][dD][89a-fA-F]", data):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _Wrong("half of a surrogate pair, which is no character") from error
    return content


def read_yaml(path: str | Path, *, plain: bool = False) -> Any:
    """The content of a YAML file; with ``plain`` every scalar stays the text in the file.

    Raises:
        MspError: the file cannot be read, or is refused; see the module.
    """
    try:
        return parse_yaml(_bytes(path, "YAML").decode("utf-8"), plain=plain)
    except ValueError as error:
        raise MspError(f"{path}: cannot be read: {error}") from error


def parse_yaml(text: str, *, plain: bool = False) -> Any:
    """``read_yaml`` of a text; raises ``ValueError``."""
    import yaml

    class Loader(yaml.BaseLoader if plain else yaml.SafeLoader):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > DEEPEST:
                raise _Wrong(f"nested deeper than {DEEPEST}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        loader = Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_nodes(root)
            content = loader.construct_document(root)
        finally:
            loader.dispose()
    except _Wrong:
        raise
    except Exception as error:  # from yaml, and from its conversion of odd scalars: dates, numbers, merges
        raise _Wrong(" ".join(str(error).split()) or type(error).__name__) from error
    if not plain:
        _check_numbers(content)
    return content


def text(value: object, name: str) -> str:
    """``value``, a string; ``MspError`` with ``name`` otherwise."""
    if not isinstance(value, str):
        raise MspError(f"{name}: {shown(value)} is not a text")
    return value


def whole(value: object, name: str, least: int = 0, most: int = LARGEST) -> int:
    """``value``, an integer in ``[least, most]``; ``MspError`` with ``name`` otherwise."""
    if type(value) is not int or not least <= value <= most:
        limits = f"of at least {least}" if most == LARGEST else f"from {least} to {most}"
        raise MspError(f"{name}: {shown(value)} is not a whole number {limits}")
    return value


def real(value: object, name: str, least: float = -math.inf) -> float:
    """``value``, a finite number that is not below ``least``; ``MspError`` with ``name`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MspError(f"{name}: {shown(value)} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < least:
        raise MspError(f"{name}: {shown(value)} is not a finite number{'' if least < 0 else f' from {least:g} on'}")
    return number


def array(value: object, name: str, length: int | None = None) -> list[Any]:
    """``value``, a list, of ``length`` entries if that is given; ``MspError`` with ``name`` otherwise."""
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        raise MspError(f"{name}: {shown(value)} is not a list{'' if length is None else f' of {length}'}")
    return list(value)


def table(value: object, name: str, keys: Iterable[str] = ()) -> Mapping[str, Any]:
    """``value``, a mapping from texts that has ``keys``; ``MspError`` with ``name`` otherwise."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise MspError(f"{name}: {shown(value)} is not an object")
    for key in keys:
        if key not in value:
            raise MspError(f"{name}: {key} is missing")
    return value


def plain(value: object, name: str, depth: int = DEEPEST) -> Any:
    """``value``, made of the types of JSON, in finite depth; ``MspError`` with ``name`` otherwise."""
    if depth == 0:
        raise MspError(f"{name}: nested deeper than {DEEPEST}")
    if isinstance(value, Mapping):
        return {key: plain(item, f"{name}.{key}", depth - 1) for key, item in table(value, name).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, name, depth - 1) for item in value]
    if isinstance(value, float):
        return real(value, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return whole(value, name, -LARGEST)
    if value is None or isinstance(value, (str, bool)):
        return value
    raise MspError(f"{name}: {shown(value)} is not a value that JSON has")


def file_inside(folder: Path, name: object, where: str) -> Path:
    """The file that an index in ``folder`` calls ``name``: in that folder, also when links are followed.

    A snapshot of the hub's cache links to the blobs of the same repository.

    Raises:
        MspError: ``name`` is absolute, goes up, or is a link that leads elsewhere; ``where`` starts the message.
    """
    parts = Path(text(name, where)).parts
    if not parts or Path(text(name, where)).is_absolute() or ".." in parts or "\0" in str(name):
        raise MspError(f"{where}: {shown(name)} is not the name of a file in {folder}")
    file, real_folder = folder / str(name), folder.resolve()
    places = [real_folder]
    if real_folder.parent.name == "snapshots":
        places.append(real_folder.parent.parent / "blobs")
    try:
        target = file.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise MspError(f"{where}: {file} cannot be read: {error}") from error
    if not any(target.is_relative_to(place) for place in places):
        raise MspError(f"{where}: {shown(name)} is a link that leads out of {folder}")
    return file


def _bytes(path: str | Path, kind: str) -> bytes:
    most, data = MOST_BYTES[kind], bytearray()
    try:
        with Path(path).open("rb") as stream:
            # not in one read, because Python then allocates for the largest size
            while len(data) <= most and (piece := stream.read(PIECE_BYTES)):
                data += piece
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise MspError(f"{path}: cannot be read: {error}") from error
    if len(data) > most:
        raise MspError(f"{path}: larger than {most:,} bytes, the most that a {kind} file may have")
    return bytes(data)


def _depth(data: bytes) -> int:
    """The depth of nested brackets outside of strings; computed before a recursive parser reads them."""
    import numpy as np

    brackets = np.frombuffer(_STRING.sub(b"", data).translate(None, _NO_BRACKETS), np.uint8)
    if not brackets.size:
        return 0
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    return int(np.where(opening, 1, -1).cumsum().max())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Wrong(f"{shown(next(name for name in names if names.count(name) > 1))} stands there twice")
    return content


def _int(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST <= int(digits) <= LARGEST:
        raise _Wrong(f"{digits[:20]}...: a number that no 64-bit integer holds")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _Wrong(f"{digits[:20]}: a number that no double holds")
    return number


def _refuse(constant: str) -> NoReturn:
    raise _Wrong(f"{constant}, which is no number of JSON")


def _check_nodes(root: Any) -> None:
    """Refuse a YAML graph that is endless, too deep or too large once its aliases are followed, or has a key twice."""
    import yaml

    sizes: dict[int, tuple[int, int] | None] = {}

    def measure(node: Any) -> tuple[int, int]:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise _Wrong("an alias stands inside of what it names")
            return known
        sizes[id(node)] = None
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise _Wrong(f"{shown(next(key for key in keys if keys.count(key) > 1))} stands there twice")
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        found = [measure(child) for child in children]
        depth, size = 1 + max((d for d, _ in found), default=0), 1 + sum(s for _, s in found)
        if depth > DEEPEST or size > MOST_NODES:
            raise _Wrong(f"nested deeper than {DEEPEST}, or more than {MOST_NODES:,} entries")
        sizes[id(node)] = depth, size
        return depth, size

    measure(root)


def _check_numbers(content: Any) -> None:
    if isinstance(content, float) and not math.isfinite(content):
        raise _Wrong(f"{content}, which is no number")
    if isinstance(content, int) and abs(content) > LARGEST:
        raise _Wrong("a number that no 64-bit integer holds")
    children = [*content.keys(), *content.values()] if isinstance(content, dict) else content
    if isinstance(children, (list, tuple, set)):
        for child in children:
            _check_numbers(child)
