"""Every file that is read is read as it says, or refused by an error that names it: never by one of Python's own."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import BUDGET, MANIFEST, ONE, RECIPE, STAGES, TABLE, TWO, UNITS, check_state, state
from families import VOCABULARY, save_text, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msp.base.reading import MOST_BYTES, parse_json, parse_yaml, read_json, read_object, read_yaml
from msp.base.safetensors_files import INDEX, tensor_files
from msp.compressions.nm_database import _read_manifest as read_database
from msp.engine.constants import read_constants
from msp.engine.state import load_state, save_state
from msp.errors import MspError
from msp.formats.manifest import Manifest
from msp.formats.patterns import Allocation, NMPattern
from msp.models.loading import read_tokenizer
from msp.packed.info import read_manifest
from msp.plan.decode_table import DecodeTable
from msp.plan.recipe import read_rules
from msp.text.token_sets import read_windows


def manifest(path: Path) -> object:
    return read_manifest(path.parent)


def index(path: Path) -> object:
    return tensor_files(path.parent)


def constants(path: Path) -> object:
    return read_constants(path)


# file, what it holds, how it is read
READERS: dict[str, tuple[str, Any, Callable[[Path], object]]] = {
    "manifest": ("config.json", {"model_type": "llama", "quantization_config": MANIFEST}, manifest),
    "index": (
        INDEX,
        {"metadata": {"total_size": 4}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}},
        index,
    ),
    "allocation": ("allocation.json", {"a": "2:8", "b": "16:32", "c": "0:4"}, Allocation.load),
    "decode table": ("table.json", TABLE, DecodeTable.load),
    "database": ("manifest.json", {"format": 1, "levels": {"a": ["2:8"]}, "dtype": {"a": "x"}}, read_database),
    "recipe": ("recipe.yaml", RECIPE, read_rules),
    "rules": ("allocation.json", {"a": "2:8"}, read_rules),
    "constants": ("recipe.yaml", RECIPE, constants),
}
ODD = [
    None, True, False, 0, -1, 5, 2**31, 2**63, 10**400, -(10**30), 1.5, 1e308, -0.0, "", "x", "2:8", "9:8", "1" * 5000,
    "1" * 5000 + ":8", "２:8", "../x", "/etc/passwd", "a\0b", "é" * 90, [], [1], [[[]]], {}, {"a": 1}, {"": {}},
]  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value stands in ``content``, by the keys that lead there."""
    found = [path] if path else []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def mutated(content: Any, choose: random.Random) -> Any:
    """A copy with a value replaced, removed, repeated or under another name."""
    content = copy.deepcopy(content)
    for _ in range(choose.randint(1, 2)):
        *way, last = choose.choice(places(content) or [(0,)])
        parent = content
        for key in way:
            parent = parent[key]
        if not isinstance(parent, (dict, list)) or not parent:
            continue
        how = choose.randrange(4)
        if how < 2:
            parent[last] = choose.choice(ODD)
        elif how == 2:
            del parent[last]
        elif isinstance(parent, dict):
            parent[choose.choice(["", "x", "layers.0.up", last * 2])] = parent.pop(last)
        else:
            parent.append(parent[last])
    return content


def damaged(data: bytes, choose: random.Random) -> bytes:
    """A copy with bytes flipped, cut off, repeated or put in."""
    at = choose.randrange(len(data))
    how = choose.randrange(5)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes([data[at] ^ (1 << choose.randrange(8))]) + data[at + 1 :]
    if how == 2:
        return data[:at] + choose.choice(string.printable).encode() + data[at + 1 :]
    if how == 3:
        return data[:at] + data[at // 2 :]
    return (
        data[:at]
        + choose.choice([b"[" * 5000, b"NaN", b"1e999", b"\xff", b'"\\ud800"', b"&a [*a]", b"9" * 5000])
        + data[at:]
    )


def written(content: Any, name: str) -> bytes:
    import yaml

    if name.endswith(".yaml"):
        return yaml.safe_dump(content).encode()
    return json.dumps(content).encode()


FUZZED = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("kind", READERS)
@FUZZED
@given(seed=st.integers(0, 2**32), raw=st.booleans())
def test_a_mutated_file_is_read_or_refused(
    kind: str, tmp_path_factory: pytest.TempPathFactory, seed: int, raw: bool
) -> None:
    name, content, read = READERS[kind]
    folder = tmp_path_factory.getbasetemp() / kind.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    choose = random.Random(seed)
    data = damaged(written(content, name), choose) if raw else written(mutated(content, choose), name)
    (folder / name).write_bytes(data)
    try:
        read(folder / name)
    except MspError as error:
        assert name in str(error) or "quantization_config" in str(error) or kind == "constants" or raw


@pytest.mark.parametrize("kind", READERS)
def test_the_file_as_it_was_is_read(kind: str, tmp_path: Path) -> None:
    name, content, read = READERS[kind]
    (tmp_path / name).write_bytes(written(content, name))
    if kind == "constants":
        assert read(tmp_path / name) == {"generations": 3, "survivors": (0.5, 0.5)}
    else:
        assert read(tmp_path / name)


@FUZZED
@given(seed=st.integers(0, 2**32))
def test_a_mutated_manifest_of_transformers_is_read_or_refused(seed: int) -> None:
    from msp.packed.hf_quantizer import MspConfig

    entries = mutated(MANIFEST, random.Random(seed))
    try:
        config = MspConfig(**entries)
    except MspError:
        return
    again = config.manifest
    assert again == Manifest.from_dict(again.to_dict())
    for (rows, columns), pattern in zip(again.shapes.values(), again.patterns.values(), strict=True):
        assert rows > 0 and columns % pattern.m == 0


def test_a_search_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_state(tmp_path / "search.json", state(), ONE)
    assert load_state(tmp_path / "search.json", ONE, UNITS, BUDGET, STAGES) == state()
    with pytest.raises(MspError, match="another search"):
        load_state(tmp_path / "search.json", TWO, UNITS, BUDGET, STAGES)


@FUZZED
@given(seed=st.integers(0, 2**32), raw=st.booleans())
def test_a_damaged_search_never_goes_on(tmp_path_factory: pytest.TempPathFactory, seed: int, raw: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-search.json"
    save_state(path, state(), ONE)
    choose, before = random.Random(seed), path.read_bytes()
    content = json.loads(before)
    data = damaged(before, choose) if raw else json.dumps(mutated(content, choose)).encode()
    path.write_bytes(data)
    try:
        found = load_state(path, ONE, UNITS, BUDGET, STAGES)
    except MspError as error:
        assert "damaged-search.json" in str(error)
    else:
        assert json.loads(data) == content and found == state()


@FUZZED
@given(seed=st.integers(0, 2**32))
def test_a_search_that_somebody_changed_is_one_of_the_problem(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """With a checksum that is right: what the checksum does not see, the values do."""
    from msp.engine import state as module

    path = tmp_path_factory.getbasetemp() / "changed-search.json"
    save_state(path, state(), ONE)
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    changed = mutated(content, random.Random(seed))
    try:
        checksum = module._checksum(changed)
    except ValueError:
        return
    path.write_text(json.dumps({"checksum": checksum, **changed}))
    try:
        found = load_state(path, ONE, UNITS, BUDGET, STAGES)
    except MspError:
        return
    check_state(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["population"][0].__setitem__(1, [8] * 6), "costs .* of a budget of"),
        (lambda c: c["population"][0].__setitem__(1, [9, 0, 0, 0, 0, 0]), "u0: 9 is not a whole number from 0 to 8"),
        (lambda c: c["population"][0].__setitem__(1, [4, 4]), "is not a list of 6"),
        (lambda c: c["population"][0].__setitem__(0, 0.25), "another loss than was measured"),
        (lambda c: c["population"].reverse(), "order"),
        (lambda c: c["measured"][0].__setitem__(0, 2), "from 0 to 1"),
        (lambda c: c["effects"][0][1][0].__setitem__(0, 6), "from 0 to 5"),
        (lambda c: c["history"].pop(), "history does not end"),
        (lambda c: c["history"].clear(), "history does not end"),
        (lambda c: c.__setitem__("tokens", -1), "tokens: -1"),
        (lambda c: c.__setitem__("generation", True), "generation: True"),
    ],
)
def test_what_is_no_search_of_the_problem_is_named(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    from msp.engine import state as module

    path = tmp_path / "search.json"
    save_state(path, state(), ONE)
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    change(content)
    path.write_text(json.dumps({"checksum": module._checksum(content), **content}))
    with pytest.raises(MspError, match=message):
        load_state(path, ONE, UNITS, BUDGET, STAGES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "deeper than 64"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "no double"),
        (b"[" + b"9" * 5000 + b"]", "64-bit"),
        (b"[99999999999999999999]", "64-bit"),
        (b'["\\ud800"]', "surrogate"),
        (b'"\xff"', "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_strict_json_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(MspError, match=rf"x\.json: cannot be read: .*{message}"):
        read_json(tmp_path / "x.json")


def test_brackets_in_texts_are_not_counted() -> None:
    content = {"a": "[" * 1000 + '"' + "\\" * 3 + "{" * 100, "b": ["]}", "\\", '\\"[']}
    assert parse_json(json.dumps(content).encode()) == content


def test_surrogate_pairs_are_characters() -> None:
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]


def test_files_of_others_may_have_infinite_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"limit": [0.0, Infinity], "length": 1000000000000000019884624838656}')
    assert read_object(tmp_path / "x.json", foreign=True) == {
        "limit": [0.0, math.inf],
        "length": 10**30 + 19884624838656,
    }
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(MspError, match="not a JSON object"):
        read_object(tmp_path / "x.json", foreign=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "deeper than 64"),
        ("a: " + "[" * 65 + "]" * 65, "deeper than 64"),
        ("&a [*a]", "inside of what it names"),
        ("{a: 1, a: 2}", "'a' stands there twice"),
        ("a: 1\nb:\n  c: 1\n  c: 1\n", "'c' stands there twice"),
        (
            "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else 'x'] * 10)}]" for i in range(9)),
            "entries",
        ),
        ("a: .nan", "no number"),
        ("a: [1e400]", None),  # a text to YAML 1.1, as 1e400 lacks a point and a sign
        ("a: 1.0e+400", "no number"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2024-99-99", "month"),
        ("? [a]\n: 1", "hashable"),
        ("a: \x07", "special characters"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    if message is None:
        assert read_yaml(tmp_path / "x.yaml") == {"a": ["1e400"]}
        return
    with pytest.raises(MspError, match=rf"x\.yaml: cannot be read: .*{message}"):
        read_yaml(tmp_path / "x.yaml")


def test_aliases_are_followed() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}
    assert parse_yaml("a: 4:8", plain=True) == {"a": "4:8"}
    assert parse_yaml("") is None


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOST_BYTES, "JSON", 10)
    (tmp_path / "x.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(MspError, match="larger than 10 bytes"):
        read_json(tmp_path / "x.json")
    with pytest.raises(MspError, match="larger than 10 bytes"):
        read_json("/dev/zero")


@pytest.mark.parametrize("name", ["", ".", "/", "\0", "x" * 5000])
def test_paths_that_no_file_has_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(MspError, match="cannot be read"):
        read_json(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", ""])
def test_an_index_does_not_leave_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(MspError, match="is not the name of a file"):
        tensor_files(folder)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    (folder / "y.safetensors").touch()
    os.symlink("y.safetensors", folder / "x.safetensors")
    assert len(tensor_files(folder)) == 2
    (folder / "x.safetensors").unlink()
    (tmp_path / "elsewhere").touch()
    os.symlink("../elsewhere", folder / "x.safetensors")
    with pytest.raises(MspError, match="leads out of"):
        tensor_files(folder)
    os.symlink(folder, tmp_path / "linked")  # the folder itself may be a link
    (folder / "x.safetensors").unlink()
    os.symlink("x.safetensors", folder / "x.safetensors")
    with pytest.raises(MspError, match=r"x\.safetensors"):
        tensor_files(tmp_path / "linked")


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "4567").touch()
    os.symlink("../../blobs/4567", snapshot / "x.safetensors")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert tensor_files(snapshot) == (snapshot / "x.safetensors",)


def test_patterns_are_of_plain_digits() -> None:
    assert NMPattern.parse(" 2:8 ") == NMPattern(2, 8)
    for wrong in ("２:8", "2:8\0", "1" * 5000 + ":8", "-1:8"):
        with pytest.raises(MspError, match="not a pattern"):
            NMPattern.parse(wrong)


@settings(FUZZED, max_examples=25)
@given(seed=st.integers(0, 2**32), raw=st.booleans())
def test_a_mutated_tokenizer_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int, raw: bool) -> None:
    folder, choose = tmp_path_factory.getbasetemp() / "tokenizer", random.Random(seed)
    tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_text(folder / "text.txt", 0)
    file = folder / choose.choice(["tokenizer.json", "tokenizer_config.json"])
    before = file.read_bytes()
    file.write_bytes(damaged(before, choose) if raw else json.dumps(mutated(json.loads(before), choose)).encode())
    with contextlib.suppress(MspError):
        read = read_tokenizer(str(folder), folder)
        windows = read_windows(str(folder / "text.txt"), read, VOCABULARY, window=16, tokens=64)
        assert int(windows.min()) >= 0 and int(windows.max()) < VOCABULARY


def test_levels_of_a_search_are_those_of_its_units() -> None:
    assert all(np.array(key).max() <= 8 for _, key in state().population)
