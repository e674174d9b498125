"""A hash for every stored tensor: it tells damage, whatever file of the checkpoint the tensor lies in.

The hash is XXH3 of 64 bits over dtype, shape and the bytes as stored, so how a model is cut into shards makes no
difference. ``hashes`` in the ``quantization_config`` of ``config.json`` has them, by the names that tensors are stored
under. XXH3 finds damage, not forgery: whoever can write the model can write its hashes.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from msp.base.reading import array, parse_json, table, text, whole
from msp.errors import MspError

if TYPE_CHECKING:
    from msp.base.safetensors_files import TensorHeader

THREADS = 4
# As safetensors spells them.
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_noted: set[str] = set()


def wanted() -> bool:
    """Whether loading compares hashes: always, unless ``MSP_VERIFY=0``."""
    return os.environ.get("MSP_VERIFY", "1").strip().lower() not in ("0", "false", "off", "no")


def hash_bytes(dtype: str, shape: Iterable[int], data: memoryview) -> str:
    """The hash of a tensor that lies in ``data``: 16 hexadecimal digits."""
    state = xxhash.xxh3_64(f"{dtype}{list(shape)}".encode())
    state.update(data)
    return state.hexdigest()


def hash_tensor(tensor: Tensor) -> str | None:
    """The hash that ``tensor`` has when it is stored; None for one without data here, or of a dtype not known."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.dtype not in NAMES:
        return None
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = memoryview(bytearray(0))
    if flat.numel():
        data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return hash_bytes(NAMES[tensor.dtype], tensor.shape, data)


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hashes of ``tensors``; none at all if one of them cannot be hashed or is not finite.

    What is loaded with the right hashes is finite by that.
    """
    from msp.base.finite import is_finite

    hashes = {}
    for name, tensor in tensors.items():
        found = hash_tensor(tensor)
        if found is None or not is_finite(tensor):
            return {}
        hashes[name] = found
    return hashes


class Hashing:
    """Hashes of all tensors in safetensors files, in threads of their own that begin at once.

    Args:
        headers: of what is stored, by the stored names.
    """

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name, header in headers.items():
            by_file[header.file].append(name)
        self._headers = headers
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="msp-hash")
        self._found: dict[str, Future[str]] = {}
        for file, names in by_file.items():
            places = data_places(file)
            with file.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            for name in names:
                self._found[name] = self._pool.submit(_hash_mapped, headers[name], mapped, *places[name])
        self._pool.shutdown(wait=False)

    def result(self) -> dict[str, str]:
        """The hashes by stored name, when all are known."""
        return {name: future.result() for name, future in self._found.items()}

    def compare(self, hashes: Mapping[str, str]) -> None:
        """Raise ``MspError`` naming a tensor whose hash is not that in ``hashes``, or that has none there."""
        for name, found in self.result().items():
            file = self._headers[name].file
            if name not in hashes:
                raise MspError(f"{file}: {name} has no hash in config.json, and the other tensors have: it was added")
            if found != hashes[name]:
                raise MspError(
                    f"{file}: {name} is damaged: its hash is {found}, and config.json has {hashes[name]}; fetch or "
                    "make the model again"
                )

    def cancel(self) -> None:
        """Begin no more of them."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _hash_mapped(header: TensorHeader, mapped: mmap.mmap, start: int, stop: int) -> str:
    with memoryview(mapped) as data:
        found = hash_bytes(header.dtype, header.shape, data[start:stop])
    if hasattr(mapped, "madvise"):  # what is hashed need not stay in memory
        first = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, stop - first)
    return found


def data_places(file: Path) -> dict[str, tuple[int, int]]:
    """From which byte of a safetensors file to which each tensor lies.

    Raises:
        MspError: the header is damaged.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            entries = table(parse_json(stream.read(min(size, file.stat().st_size))), "header")
        places = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                offsets = array(table(entry, name, ("data_offsets",))["data_offsets"], name, 2)
                start, stop = (8 + size + whole(offset, name, 0, file.stat().st_size) for offset in offsets)
                places[name] = start, stop
        return places
    except (OSError, ValueError) as error:
        raise MspError(f"{file}: damaged: {error}") from error


def read_hashes(value: object, where: str) -> dict[str, str]:
    """``value`` as the hashes of tensors by name; ``MspError`` with ``where`` otherwise."""
    hashes = {name: text(found, f"{where}: {name}") for name, found in table(value, where).items()}
    for name, found in hashes.items():
        if len(found) != 16 or set(found) - set("0123456789abcdef"):
            raise MspError(f"{where}: {name}: {found[:40]!r} is not 16 hexadecimal digits")
    return hashes


def note_without(source: str) -> None:
    """Warn, once for each model, that nothing can be compared."""
    if source not in _noted:
        _noted.add(source)
        warnings.warn(f"{source} has no hashes, so damage to its weights is not noticed: save it again", stacklevel=3)
