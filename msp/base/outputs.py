"""Checks the places of results before any work, locks them, writes results as a whole, replaces only msp's files.

Every folder that msp writes holds a mark, ``.msp-output.json``: ``{"format": 1, "msp": version, "files": {path:
digests}}``. The digests are SHA-256 of files that people edit, and None for the files of a model. A packed model
without a mark, such as one from a hub, is recognised by the manifest in its ``config.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from msp import __version__
from msp.base.files import open_to_readers, replacing, unwritable, write_text
from msp.base.locks import beside, inside, locked, make_folders, release, try_lock
from msp.base.reading import read_object
from msp.base.staging import clean, clean_folder, put_in_place, staged, sync_folder
from msp.errors import MspError, system_reason

# The word in ``quantization_config`` by which a packed model is known.
QUANT_METHOD = "msp"
MARK = ".msp-output.json"
FORMAT = 1
# Drawn into the folder of a model that is already complete, so no mark names them.
PICTURES = {"pictures/allocation.png", "pictures/sensitivity.png", "pictures/search.png"}
# The files of a packed model that has no mark; patterns have no folders in them.
OF_MODELS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "load_with_msp.py",
    "tokenizer*.json",
    "*.tiktoken",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    ".gitattributes",
)
WAY_OUT = "choose another place, or remove it yourself"


def check_output(
    out: str | Path, force: bool = False, *, model: Any = None, work_dir: str | Path | None = None
) -> Path:
    """The directory for a model, links resolved; call it before any long work.

    Args:
        model: the model that the run reads: a folder, or anything else, which is ignored.
        work_dir: the work folder of the run.

    Raises:
        MspError: ``out`` exists and ``force`` is off; it may not be replaced, see ``check_replaceable``; it is in
            ``work_dir`` or contains it; or nothing can be created next to it.
    """
    target = Path(os.path.realpath(out))
    if work_dir is not None:
        work = Path(os.path.realpath(work_dir))
        if target == work or target in work.parents or work in target.parents:
            raise MspError(f"{out} and the work folder {work_dir} are not apart: choose another place for one of them")
    if os.path.lexists(target):
        if not force:
            raise MspError(f"{out} exists already; ask for it to be replaced with force")
        check_replaceable(out, model=model)
    check_writable(target.parent, out)
    return target


def check_replaceable(out: str | Path, *, model: Any = None) -> None:
    """Check that msp wrote everything in the folder ``out`` and that nothing else uses it now.

    Raises:
        MspError: it is no folder, or one that msp did not write, or holds a file that msp did not write; it is a link
            that leads out of its folder, or a mounted disk; or it has the current directory, a home or ``model`` in it,
            or is in ``model``. The message names the obstacle and a remedy.
    """
    path, target = Path(out), Path(os.path.realpath(out))
    if not target.is_dir():
        raise MspError(f"{out} exists and is not a model, so it is not replaced; {WAY_OUT}")
    if path.is_symlink() and target.parent != Path(os.path.realpath(path.absolute().parent)):
        raise MspError(f"{out} is a link to {target}, so it is not replaced: name that folder itself")
    if os.path.ismount(target):
        raise MspError(f"{out} is a mounted disk, which cannot be replaced: choose a folder on it")
    for place, kind in _in_use(model):
        if place == target or target in place.parents:
            raise MspError(f"{out} is, or has in it, {kind} {place}, so it is not replaced; choose another place")
    source = _folder_of(model)
    if source is not None and source in target.parents:
        raise MspError(f"{out} is in the model {source} that is read, so it is not replaced; choose another place")
    _clear(out, target)
    if not any(target.iterdir()):
        return
    if read_mark(target) is None and not _is_packed(target):
        raise MspError(f"{out} exists and is not a model that msp wrote, so it is not replaced; {WAY_OUT}")
    for drawn in {target / Path(name).parent for name in PICTURES}:
        if drawn.is_dir() and not drawn.is_symlink():
            clean_folder(drawn)  # from a run that was killed while it drew
    strange = foreign(target)
    if strange is not None:
        raise MspError(f"{out} is not replaced, since msp did not write {strange} in it: move that away, or {WAY_OUT}")


def _clear(out: str | Path, target: Path) -> None:
    """Remove the files that a killed search left in its folder; ``MspError`` if a live run writes there."""
    lock = inside(target)
    if not lock.exists():
        return
    descriptor = try_lock(lock)
    if descriptor is None:
        raise MspError(f"{out} is the folder of another run that has not ended: wait, or choose another place")
    try:
        clean_folder(target)
    finally:
        release(lock, descriptor)


def foreign(folder: Path) -> str | None:
    """A path in ``folder`` that msp did not write, or that was changed afterwards; None if there is none."""
    mark = read_mark(folder)
    for file in sorted(_entries(folder)):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            return name
        if file.is_dir() or name == MARK or name in PICTURES:
            continue
        if mark is None:
            known = "/" not in name and any(fnmatch(name, pattern) for pattern in OF_MODELS)
        else:
            known = name in mark and _unchanged(file, mark[name])
        if not known:
            return name
    return None


def write_mark(folder: Path, files: Mapping[str, list[str] | None] | None = None) -> None:
    """Write the mark of ``folder``: it names ``files``, or all files there."""
    if files is None:
        names = sorted(file.relative_to(folder).as_posix() for file in _entries(folder) if file.is_file())
        files = {name: None for name in names if name != MARK}
    content = {"format": FORMAT, "msp": __version__, "files": files}
    write_text(folder / MARK, json.dumps(content, indent=1) + "\n")


def read_mark(folder: Path) -> dict[str, list[str] | None] | None:
    """The entries of the mark of ``folder``; None if it has no mark that can be read."""
    try:
        content = read_object(folder / MARK)
    except MspError:
        return None
    files = content.get("files") if content.get("format") == FORMAT else None
    if not isinstance(files, dict) or not all(map(_are_digests, files.values())):
        return None
    return files


def _are_digests(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(digest, str) for digest in value))


@contextmanager
def reserved(
    out: str | Path, force: bool = False, *, model: Any = None, work_dir: str | Path | None = None
) -> Iterator[Path]:
    """``check_output``, with ``out`` locked for the length of the context; first removes the files of killed runs.

    Raises:
        MspError: see ``check_output``; or another run, which the message names, writes to ``out``.
    """
    target = Path(os.path.realpath(out))
    check_writable(target.parent, out)
    with locked(beside(target), out) as held:
        if held:
            _clean(out, target)
        yield check_output(out, force, model=model, work_dir=work_dir)


def _clean(out: str | Path, target: Path) -> None:
    try:
        clean(target)
        clean_folder(target.parent)
    except OSError as error:
        raise unwritable(out, error) from error


@contextmanager
def new_folder(out: str | Path, force: bool = False, *, model: Any = None) -> Iterator[tuple[Path, Path]]:
    """A hidden directory that replaces ``out`` at the end of the context, and ``out`` itself, links resolved.

    Raises:
        MspError: see ``reserved``; or a file of the context cannot be written. ``out`` is then as before.
    """
    with reserved(out, force, model=model) as target:
        try:
            with staged(target) as new:
                new.mkdir()
                yield new, target
                open_to_readers(new)
                write_mark(new)
                if os.path.lexists(target):
                    check_output(out, force, model=model)  # another program may have written there in the meantime
                put_in_place(new, target)
        except (OSError, SafetensorError) as error:
            raise MspError(f"{out} cannot be written: {error}") from error


@contextmanager
def working_folder(folder: str | Path | None) -> Iterator[None]:
    """A folder to write into, created if it is absent, and locked for the length of the context; None does nothing.

    It is removed afterwards if it is empty.

    Raises:
        MspError: it is no folder or cannot be written to; or another run, which the message names, uses it.
    """
    if folder is None:
        yield
        return
    place = Path(os.path.realpath(folder))
    check_writable(place, folder)
    with locked(inside(place), folder) as held:
        if held:
            clean_folder(place)
        yield


def check_writable(folder: Path, name: str | Path) -> None:
    """Check that files can be created in ``folder``, or in its nearest parent that exists.

    Raises:
        MspError: they cannot; the message begins with ``name``.
    """
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise MspError(f"{name} cannot be written: {folder} is a file, and a folder is needed there")
    try:
        # Permission bits are not enough: a read-only mount, a full disk or an ACL may still refuse. The file has no
        # name.
        tempfile.TemporaryFile(prefix=".msp-", dir=folder).close()
    except OSError as error:
        raise MspError(f"{name} cannot be written: {folder}: {system_reason(error)}") from error


def check_file(path: str | Path) -> None:
    """Check that a file can be written to ``path``; call it before any long work.

    Raises:
        MspError: a folder is in the way, or nothing can be created there.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise MspError(f"{path} is a folder, and a file is to be written there: choose another name")
    check_writable(target.parent, path)


def check_temporary() -> None:
    """Check that temporary files can be created; the ``MspError`` explains how to choose another place for them."""
    try:
        with tempfile.TemporaryFile(prefix="msp-") as file:
            file.write(b"\0")
    except OSError as error:
        raise MspError(f"no temporary file can be written: {error}; set TMPDIR to a folder with room in it") from error


def check_room(out: str | Path, size: int, what: str) -> None:
    """Check that ``size`` bytes fit on the disk of ``out``.

    Raises:
        MspError: they do not fit; the message names ``what``, which takes them.
    """
    folder = Path(os.path.realpath(out)).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise MspError(f"{out}: {what} takes {size:,} bytes, and {free:,} are free there")


def check_results(folder: str | Path, names: Iterable[str]) -> None:
    """Check that files ``names`` can be written to ``folder``, and that msp wrote all of them that exist.

    Raises:
        MspError: msp did not write one, or it was edited afterwards; or nothing can be created in the place.
    """
    place = Path(os.path.realpath(folder))
    check_writable(place, folder)
    mark = read_mark(place) or {}
    for name in names:
        file = place / name
        if file.is_dir():
            raise MspError(f"{Path(folder) / name} is a folder, and a file is to be written there: {WAY_OUT}")
        if os.path.lexists(file) and not (name in mark and _unchanged(file, mark[name])):
            how = "was changed since msp wrote it" if name in mark else "was not written by msp"
            raise MspError(f"{Path(folder) / name} {how}, so it is not replaced: move it away, or choose another place")


def write_results(folder: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Write files to ``folder``, each in one step, and the mark of the folder.

    Raises:
        MspError: see ``check_results``; or they cannot be written.
    """
    check_results(folder, contents)
    try:
        for made in make_folders(Path(os.path.realpath(folder))):
            sync_folder(made.parent)
    except OSError as error:
        raise unwritable(folder, error) from error
    encoded = {name: text.encode() if isinstance(text, str) else text for name, text in contents.items()}
    digests = {name: _digest(content) for name, content in encoded.items()}
    before = read_mark(folder) or {}
    # A run that is killed between two files has written one of two versions of each.
    write_mark(folder, before | {name: [*(before.get(name) or []), digest] for name, digest in digests.items()})
    for name, content in encoded.items():
        with replacing(folder / name) as new:
            new.write_bytes(content)
    write_mark(folder, before | {name: [digest] for name, digest in digests.items()})
    return [folder / name for name in encoded]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _unchanged(file: Path, digests: list[str] | None) -> bool:
    return digests is None or (file.is_file() and _digest(file.read_bytes()) in digests)


def _entries(folder: Path) -> Iterator[Path]:
    """All paths below ``folder``, without following links."""
    for entry in folder.iterdir():
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from _entries(entry)


def _is_packed(folder: Path) -> bool:
    try:
        quantised = read_object(folder / "config.json", foreign=True).get("quantization_config")
    except MspError:
        return False
    return isinstance(quantised, dict) and quantised.get("quant_method") == QUANT_METHOD


def _in_use(model: Any) -> Iterator[tuple[Path, str]]:
    """Folders, links resolved, that may not be replaced, each with its description."""
    with suppress(OSError):  # the current directory may be gone
        yield Path(os.path.realpath(os.getcwd())), "the current directory"
    homes = {os.path.expanduser("~"), *(entry.pw_dir for entry in pwd.getpwall())}
    for home in sorted(homes):
        if os.path.isdir(home):
            yield Path(os.path.realpath(home)), "the home"
    source = _folder_of(model)
    if source is not None:
        yield source, "the model that is read"
        # a folder of links, as in the cache of a hub
        for file in source.iterdir():
            if file.is_symlink():
                yield Path(os.path.realpath(file)), "the model that is read, of which there is a file in"


def _folder_of(model: Any) -> Path | None:
    """The folder that ``model`` names or was loaded from, links resolved; None if there is none."""
    named = (
        model if isinstance(model, (str, os.PathLike)) else getattr(getattr(model, "config", None), "_name_or_path", "")
    )
    return Path(os.path.realpath(named)) if named and os.path.isdir(named) else None
