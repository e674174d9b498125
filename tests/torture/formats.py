"""Every format that msp reads: a sample, the reader, and what a file that is not refused must be read as.

``expected`` reads the changed bytes by other means than msp: Python's own JSON, CSV and decompressors, PyYAML, and
safetensors by hand. ``SAME`` says that whatever is not refused must give what the unchanged file gives: hashes cover
it. ``None`` is for formats of which nothing else says what is right; then only the kind of error is judged.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from contents import BUDGET, MANIFEST, ONE, RECIPE, STAGES, TABLE, UNITS, check_state, state
from families import VOCABULARY, packed_model, save, tokenizer
from texts import VOCABULARY as TEXT_VOCABULARY
from texts import byte_tokenizer, random_text

from msp.base.hashes import hash_tensor
from msp.base.outputs import MARK, check_replaceable
from msp.base.safetensors_files import INDEX, read_headers, read_tensor, tensor_files
from msp.compressions.nm_database import LevelDatabase
from msp.compressions.nm_database import _read_manifest as read_database
from msp.engine import state as state_module
from msp.engine.constants import DEFAULTS, read_constants
from msp.engine.evolution import UNLIMITED
from msp.engine.state import load_state, save_state
from msp.formats.patterns import Allocation, NMPattern
from msp.models.loading import load_model, read_causal_config, read_tokenizer
from msp.ops import nm_select
from msp.packed.checkpoint import save_packed
from msp.packed.info import read_manifest, validate_packed
from msp.plan.decode_table import DecodeTable
from msp.plan.recipe import read_rules
from msp.recovery.checkpoints import FinishedPhase, Measured, WorkFolder
from msp.recovery.checkpoints import _read as read_recovery
from msp.text.token_sets import TokenSource, save_tokens
from torture.mutators import as_json, reshaped

SAME = "same"


@dataclass
class Format:
    """A kind of file.

    Attributes:
        target: the file that is changed, by its name in the folder; the others stay.
        read: takes the path of ``target`` and returns what can be compared.
        full: how many changed files a full run reads.
        shape: how to change the content and write it: ``json``, ``yaml``, or nothing.
        change: instead of all else, makes the changed bytes of the sample's.
    """

    name: str
    target: str
    read: Callable[[Path], Any]
    expected: Callable[[bytes], Any] | str | None
    full: int
    files: dict[str, bytes] = field(default_factory=dict)
    shape: str = ""
    change: Callable[[bytes, random.Random], bytes] | None = None

    @property
    def sample(self) -> bytes:
        return self.files[self.target]


def strict(data: bytes) -> Any:
    return json.loads(data.decode("utf-8"))


def pair(text: str) -> tuple[int, int]:
    n, m = text.split(":")
    return int(n), int(m)


def pairs(patterns: Any) -> dict[str, tuple[int, int]]:
    return {name: (pattern.n, pattern.m) for name, pattern in patterns.items()}


# what stands in a safetensors file, by hand

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def stored(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    body, found = data[8 + size :], {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            found[name] = entry["dtype"], tuple(entry["shape"]), body[start:stop]
            assert len(found[name][2]) == stop - start
    return found


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# JSON and YAML


def rules(path: Path) -> Any:
    return [
        (regex.pattern, None if storage.support is None else (storage.support.n, storage.support.m))
        for regex, storage in read_rules(path).keep
    ]


def expected_rules(data: bytes) -> Any:
    import re

    found = []
    for stage in yaml.load(data.decode(), yaml.BaseLoader).values():
        for group in stage.values() if isinstance(stage, dict) else ():
            modifier = group.get("NMPruningModifier") if isinstance(group, dict) else None
            if isinstance(modifier, dict) and isinstance(modifier.get("patterns"), dict):
                for name, text in modifier["patterns"].items():
                    regex = name[3:] if name.startswith("re:") else re.escape(name)
                    found.append((regex, None if text == "dense" else pair(text)))
    return found


def expected_constants(data: bytes) -> Any:
    found = yaml.safe_load(data.decode())["made_by"]["search"]
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key in DEFAULTS}
    if isinstance(found.get("generations"), int) and found["generations"] >= UNLIMITED:
        del found["generations"]
    return found


def expected_table(data: bytes) -> Any:
    content = strict(data)
    keys = ("dtype", "machine", "linears")
    return {"tokens": 1, **{key: content[key] for key in keys}} | {
        "linears": [{key: entry[key] for key in ("shape", "microseconds")} for entry in content["linears"]]
    }


def manifest(path: Path) -> Any:
    found = read_manifest(path.parent)
    return pairs(found.patterns), dict(found.shapes), dict(found.shared), dict(found.recipe), dict(found.hashes)


def expected_manifest(data: bytes) -> Any:
    entries = strict(data)["quantization_config"]
    return (
        {name: pair(text) for name, text in entries["allocation"].items()},
        {name: tuple(shape) for name, shape in entries["shapes"].items()},
        *(entries.get(key) or {} for key in ("shared", "recipe", "hashes")),
    )


def files_of(path: Path) -> Any:
    return sorted(os.path.relpath(file, path.parent) for file in tensor_files(path.parent))


def search(path: Path) -> Any:
    return load_state(path, ONE, UNITS, BUDGET, STAGES)


def search_of_the_problem(path: Path) -> Any:
    check_state(load_state(path, ONE, UNITS, BUDGET, STAGES))
    return True


def with_checksum(data: bytes, choose: random.Random) -> bytes:
    content = reshaped({key: value for key, value in json.loads(data).items() if key != "checksum"}, choose)
    try:
        checksum = state_module._checksum(content)
        return json.dumps({"checksum": checksum, **content}).encode()
    except (ValueError, TypeError):
        return as_json(content)


def phases_of_recovery(path: Path) -> str:
    return repr(read_recovery(path, ONE))  # a loss that is not a number is equal to none


def best_of_recovery(path: Path) -> Any:
    found = WorkFolder(path.parent, ONE, resume=True).best(0)
    assert found is not None
    return {name: tensor.tolist() for name, tensor in found[0].items()}, found[1]


def save_recovery(folder: Path) -> None:
    folder.mkdir()
    work, losses = WorkFolder(folder, ONE, resume=False), [Measured(0, 1.5), Measured(4, float("nan"))]
    work.save_best(0, {"a.values": torch.arange(24.0).view(4, 6), "norm.weight": torch.ones(8)}, losses[0])
    work.finish(FinishedPhase("Distilling", 1.5, 1.5, 0, 4, losses, losses))


def database(folder: Path) -> tuple[LevelDatabase, dict[str, torch.Tensor]]:
    shapes = {"a": (8, 16), "b": (4, 32)}
    patterns = [NMPattern.parse(text) for text in ("0:8", "2:8", "5:8", "8:8")]
    dtypes = dict.fromkeys(shapes, torch.float16)
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return LevelDatabase(folder, shapes, dict.fromkeys(shapes, patterns), dtypes, {"seed": "1"}), weights


def levels(path: Path) -> Any:
    found = database(path.parent)[0].read()
    return {
        (name, str(pattern), part): hash_tensor(getattr(packed, part))
        for name, own in found.items()
        for pattern, packed in own.items()
        for part in ("values", "bitmask")
    }


# models


def packed_tensors(path: Path) -> Any:
    validate_packed(path.parent)
    headers = read_headers(tensor_files(path.parent))
    found = {name: read_tensor(headers, name) for name in headers}
    # guards may be there or not
    return {name: hash_tensor(tensor) for name, tensor in found.items() if tensor.numel()}


def loaded(path: Path) -> Any:
    return {
        name: hash_tensor(tensor)
        for name, tensor in load_model(path.parent, dtype="auto").model.state_dict().items()
        if tensor.numel()
    }


def forwarded(path: Path) -> Any:
    """A model is loaded and called; a wrong position would have a kernel read past the end."""
    model = load_model(path.parent).model
    with torch.no_grad():
        for tokens in (3, 40):
            assert model(input_ids=torch.arange(tokens)[None]).logits.shape[1] == tokens
    return True


def loaded_alike(path: Path) -> Any:
    """Weights, rounded: ``config.json`` may name the dtype that they are cast to."""
    return {
        name: torch.round(tensor.float() * 64).sum().item() if tensor.is_floating_point() else hash_tensor(tensor)
        for name, tensor in load_model(path.parent, dtype="float32").model.state_dict().items()
        if tensor.numel()
    }


def expected_dense(data: bytes) -> Any:
    found = {}
    for name, (dtype, shape, body) in stored(data).items():
        array = np.frombuffer(body, DTYPES[dtype]).astype("<f4").reshape(shape)
        assert np.isfinite(array).all()
        found[name] = hash_tensor(torch.from_numpy(array.copy()))
    return found


def read_vocabulary(path: Path) -> Any:
    found = read_tokenizer(str(path.parent), path.parent)
    (path.parent / "some.txt").write_text("w5 w6 w7 odd w8")
    TokenSource.parse(str(path.parent / "some.txt")).read(found, 1 << 20)
    return True


# texts

TOKENIZER = byte_tokenizer()


def read_text(path: Path) -> Any:
    return TokenSource.parse(str(path)).read(TOKENIZER, TEXT_VOCABULARY).tolist()


def unpacked(data: bytes) -> bytes:
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    if data[:3] == b"BZh" and data[4:10] == b"1AY&SY":
        return bz2.decompress(data)
    return lzma.decompress(data) if data[:6] == b"\xfd7zXZ\0" else data


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, verbose=False)["input_ids"])


def expected_text(data: bytes) -> list[int]:
    return encode(unpacked(data).decode("utf-8").removeprefix("\ufeff"))


def of_documents(texts: list[str]) -> list[int]:
    found: list[int] = []
    for text in texts:
        assert isinstance(text, str)
        if text.strip():
            found += [TOKENIZER.bos_token_id, *TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return found


def expected_json_text(data: bytes) -> list[int]:
    text, at, records = unpacked(data).decode("utf-8").removeprefix("\ufeff").strip(" \t\r\n"), 0, list[Any]()
    if text.startswith("["):
        records = json.loads(text)
    while not text.startswith("[") and at < len(text):
        record, at = json.JSONDecoder().raw_decode(text, at)
        records.append(record)
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
    return of_documents([record["text"] for record in records])


def expected_csv(delimiter: str) -> Callable[[bytes], list[int]]:
    def expected(data: bytes) -> list[int]:
        text = unpacked(data).decode("utf-8").removeprefix("\ufeff")
        rows = [row for row in csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True) if row]
        return of_documents([dict(zip(rows[0], row, strict=True))["text"] for row in rows[1:]])

    return expected


def read_ids(path: Path) -> Any:
    return TokenSource.parse(str(path)).read(None, VOCABULARY).tolist()


def expected_ids(data: bytes) -> list[int]:
    ((dtype, shape, body),) = stored(data).values()
    found = np.frombuffer(body, DTYPES[dtype]).astype(np.int64)
    assert len(found) == math.prod(shape)
    return [int(each) for each in found]


def text_formats() -> list[Format]:
    import pyarrow as pa
    import pyarrow.parquet

    prose = random_text(3, 60).encode()
    records = [{"text": random_text(seed, 9), "n": seed, "deeper": {"x": [1, 2]}} for seed in range(6)]
    lines = "\n".join(map(json.dumps, records)).encode()
    buffer = io.StringIO(newline="")
    for delimiter in ",\t":
        writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\n")
        writer.writerows([["n", "text"], *([str(record["n"]), record["text"]] for record in records)])
        buffer.write("\f")
    comma, tab, _ = buffer.getvalue().split("\f")
    table = pa.table({"text": [record["text"] for record in records], "n": list(range(6))})
    parquet, file, stream = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    samples: list[tuple[str, bytes, Any, int]] = [
        ("text.txt", prose, expected_text, 6000),
        ("text.txt.gz", gzip.compress(prose, mtime=0), expected_text, 3000),
        ("text.txt.bz2", bz2.compress(prose), expected_text, 2000),
        ("text.txt.xz", lzma.compress(prose), expected_text, 2000),
        ("text.jsonl", lines, expected_json_text, 6000),
        ("text.json", json.dumps(records).encode(), expected_json_text, 6000),
        ("text.jsonl.gz", gzip.compress(lines, mtime=0), expected_json_text, 2000),
        ("text.csv", comma.encode(), expected_csv(","), 4000),
        ("text.tsv", tab.encode(), expected_csv("\t"), 4000),
        ("text.parquet", parquet.getvalue(), None, 4000),
        ("text.arrow", file.getvalue(), None, 4000),
        ("stream.arrow", stream.getvalue(), None, 4000),
    ]
    return [
        Format(name, name, read_text, expected, full, {name: data}, "json" if name == "text.json" else "")
        for name, data, expected, full in samples
    ]


def every_format(work: Path) -> list[Format]:
    """All formats, their samples made in ``work``."""
    save("llama", work / "dense")
    save_packed(packed_model("llama"), tokenizer(), work / "packed", recipe={"of": "llama"})
    save_packed(packed_model("llama"), tokenizer(), work / "shards", recipe={"of": "llama"}, max_shard_size="20KB")
    save_state(work / "search.json", state(), ONE)
    save_recovery(work / "recovery")
    save_tokens(torch.randint(0, VOCABULARY, (64,)), work / "tokens.safetensors")
    levels_of, weights = database(work / "database")
    levels_of.open()
    for name, weight in weights.items():
        levels_of.write(name, [nm_select(weight, pattern) for pattern in levels_of.patterns[name]])
    dense, packed, shards = (read_folder(work / name) for name in ("dense", "packed", "shards"))
    level_files, recovered = read_folder(work / "database"), read_folder(work / "recovery")
    shard = min(name for name in shards if name.endswith(".safetensors"))
    config = json.loads(packed["config.json"])
    del config["quantization_config"]["hashes"]
    bare = {**packed, "config.json": json.dumps(config).encode()}
    vocabulary = {name: dense[name] for name in dense if name.startswith(("tokenizer", "special", "config"))}
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    table = {**TABLE, "linears": [dict(entry) for entry in TABLE["linears"]]}

    def one(name: str, target: str, read: Any, expected: Any, full: int, content: Any, shape: str = "json") -> Format:
        data = yaml.safe_dump(content).encode() if shape == "yaml" else json.dumps(content).encode()
        return Format(name, target, read, expected, full, {target: data}, shape)

    allocation = {"a": "2:8", "b": "16:32", "c": "0:4"}
    pruned_config = {"model_type": "llama", "quantization_config": MANIFEST}
    searched = {"search.json": (work / "search.json").read_bytes()}
    return [
        one("allocation.json", "allocation.json", lambda path: pairs(Allocation.load(path)),
            lambda data: {name: pair(text) for name, text in strict(data).items()}, 6000, allocation),
        one("recipe.yaml", "recipe.yaml", rules, expected_rules, 4000, RECIPE, "yaml"),
        one("recipe.yaml: constants", "recipe.yaml", read_constants, expected_constants, 3000, RECIPE, "yaml"),
        one("decode table", "table.json", lambda path: DecodeTable.load(path).to_json(), expected_table, 5000, table),
        one("level database: manifest.json", "manifest.json", read_database, strict, 4000,
            {"format": 1, "levels": {"a": ["2:8"]}, "dtype": {"a": "x"}}),
        one("model.safetensors.index.json", INDEX, files_of,
            lambda data: sorted(map(os.path.normpath, set(strict(data)["weight_map"].values()))), 5000, index),
        one("config.json: manifest", "config.json", manifest, expected_manifest, 6000, pruned_config),
        Format("search.json", "search.json", search, SAME, 5000, searched, "json"),
        Format("search.json: right checksum", "search.json", search_of_the_problem, None, 4000, searched,
               change=with_checksum),
        Format("recovery.json", "recovery.json", phases_of_recovery, SAME, 4000, recovered, "json"),
        Format("recovery: best values", "phase-000.safetensors", best_of_recovery, SAME, 2000, recovered),
        Format("level database: tensors", "a.safetensors", levels, SAME, 4000, level_files),
        Format("model.safetensors: packed", "model.safetensors", packed_tensors, SAME, 4000, packed),
        Format("model.safetensors: a shard", shard, packed_tensors, SAME, 1500, shards),
        Format("model.safetensors.index.json: packed", INDEX, packed_tensors, SAME, 1500, shards, "json"),
        Format("config.json: packed", "config.json", packed_tensors, SAME, 1500, packed, "json"),
        Format("config.json: transformers", "config.json",
               lambda path: read_causal_config(path.parent).model_type, lambda data: strict(data)["model_type"], 3000,
               {"config.json": dense["config.json"]}, "json"),
        Format("from_pretrained: packed weights", "model.safetensors", loaded, SAME, 1000, packed),
        Format("from_pretrained: no hashes, and a call", "model.safetensors", forwarded, None, 1000, bare),
        Format("from_pretrained: config.json", "config.json", loaded_alike, SAME, 500, packed, "json"),
        Format("from_pretrained: dense weights", "model.safetensors", loaded, expected_dense, 1000, dense),
        Format("generation_config.json", "generation_config.json", loaded, SAME, 300, packed, "json"),
        Format("tokenizer.json", "tokenizer.json", read_vocabulary, None, 1500, vocabulary, "json"),
        Format("tokenizer_config.json", "tokenizer_config.json", read_vocabulary, None, 1000, vocabulary, "json"),
        Format(MARK, MARK, lambda path: check_replaceable(path.parent), None, 3000, packed, "json"),
        Format("tokens.safetensors", "tokens.safetensors", read_ids, expected_ids, 5000,
               {"tokens.safetensors": (work / "tokens.safetensors").read_bytes()}),
        *text_formats(),
    ]  # fmt: skip
