"""Where results go: checked before any work, locked meanwhile, written as a whole, and replaced only if msp wrote it.

Every folder that msp writes holds a mark, ``.msp-output.json``: ``{"format": 1, "msp": version, "files": {path:
digests}}``. The digests, SHA-256, are of files that people edit; None stands for those of a model. A packed model
without a mark, such as one from a hub, is known by the manifest in its ``config.json``.
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
from msp.base.staging import clean, clean_folder, put_in_place, staged, sync_folder
from msp.errors import MspError

# The word in ``quantization_config`` by which a packed model is known.
QUANT_METHOD = "msp"
MARK = ".msp-output.json"
FORMAT = 1
# Drawn into the folder of a model when it stands already, so no mark names them.
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
    """Where a model will be written, links resolved; to be asked before any long work.

    Args:
        model: that is read meanwhile: a folder, or anything else, which is passed over.
        work_dir: of the run.

    Raises:
        MspError: ``out`` exists and ``force`` is off; it may not be replaced, see ``check_replaceable``; it is in
            ``work_dir`` or around it; or nothing can be created beside it.
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
    """See that everything in the folder ``out`` was written by msp and that nobody needs it now.

    Raises:
        MspError: it is no folder, or one that msp did not write, or holds a file that msp did not write; it is a link
            that leads out of its folder, or a mounted disk; or it has the current directory, a home or ``model`` in it,
            or is in ``model``. The message names what is in the way, and the way out.
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
            clean_folder(drawn)  # of a run that was killed while it drew
    strange = foreign(target)
    if strange is not None:
        raise MspError(f"{out} is not replaced, since msp did not write {strange} in it: move that away, or {WAY_OUT}")


def _clear(out: str | Path, target: Path) -> None:
    """Remove what a killed search has left in its folder; ``MspError`` if one that is alive writes there."""
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
    """A path in ``folder`` that msp did not write, or that was changed since; None if there is none."""
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
    """Write down what msp has written to ``folder``: ``files``, or all that is in it."""
    if files is None:
        names = sorted(file.relative_to(folder).as_posix() for file in _entries(folder) if file.is_file())
        files = {name: None for name in names if name != MARK}
    content = {"format": FORMAT, "msp": __version__, "files": files}
    write_text(folder / MARK, json.dumps(content, indent=1) + "\n")


def read_mark(folder: Path) -> dict[str, list[str] | None] | None:
    """What msp has written to ``folder``; None where it says nothing of it."""
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
        files = content["files"] if content["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(files, dict) or not all(map(_are_digests, files.values())):
        return None
    return files


def _are_digests(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(digest, str) for digest in value))


@contextmanager
def reserved(
    out: str | Path, force: bool = False, *, model: Any = None, work_dir: str | Path | None = None
) -> Iterator[Path]:
    """``check_output``, with ``out`` locked for the length of the context; what killed runs have left goes first.

    Raises:
        MspError: see ``check_output``; or another run writes to ``out``, and which.
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
    """A hidden directory beside ``out``, and ``out`` itself, links resolved, whose place it takes in the end.

    Raises:
        MspError: see ``reserved``; or what is done in the context cannot be written. ``out`` is as before then.
    """
    with reserved(out, force, model=model) as target:
        try:
            with staged(target) as new:
                new.mkdir()
                yield new, target
                open_to_readers(new)
                write_mark(new)
                if os.path.lexists(target):
                    check_output(out, force, model=model)  # somebody may have put something there meanwhile
                put_in_place(new, target)
        except (OSError, SafetensorError) as error:
            raise MspError(f"{out} cannot be written: {error}") from error


@contextmanager
def working_folder(folder: str | Path | None) -> Iterator[None]:
    """A folder to write into, made if need be, and locked for the length of the context; None is passed over.

    It is removed afterwards if it is empty.

    Raises:
        MspError: it is no folder or cannot be written to; or another run uses it, and which.
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
    """See that files can be created in ``folder``, or in the nearest one above it that is there.

    Raises:
        MspError: they cannot; the message begins with ``name``.
    """
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise MspError(f"{name} cannot be written: {folder} is a file, and a folder is needed there")
    try:
        # Permission bits do not tell: a read-only mount, a full disk or an ACL may still refuse. The file has no name.
        tempfile.TemporaryFile(prefix=".msp-", dir=folder).close()
    except OSError as error:
        raise MspError(f"{name} cannot be written: {folder}: {error.strerror or error}") from error


def check_file(path: str | Path) -> None:
    """See that a file can be written to ``path``; to be asked before any long work.

    Raises:
        MspError: a folder is in the way, or nothing can be created there.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise MspError(f"{path} is a folder, and a file is to be written there: choose another name")
    check_writable(target.parent, path)


def check_temporary() -> None:
    """See that temporary files can be created; ``MspError`` says how to choose another place for them."""
    try:
        with tempfile.TemporaryFile(prefix="msp-") as file:
            file.write(b"\0")
    except OSError as error:
        raise MspError(f"no temporary file can be written: {error}; set TMPDIR to a folder with room in it") from error


def check_room(out: str | Path, size: int, what: str) -> None:
    """See that ``size`` bytes fit on the disk of ``out``.

    Raises:
        MspError: they do not; the message says ``what`` takes them.
    """
    folder = Path(os.path.realpath(out)).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise MspError(f"{out}: {what} takes {size:,} bytes, and {free:,} are free there")


def check_results(folder: str | Path, names: Iterable[str]) -> None:
    """See that files ``names`` can be written to ``folder``, and that none is there but what msp wrote.

    Raises:
        MspError: one that msp did not write or that was edited since, or a place where nothing can be created.
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
    """Write files to ``folder``, each in one step, and its mark.

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
    """All below ``folder``, without following links."""
    for entry in folder.iterdir():
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from _entries(entry)


def _is_packed(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _in_use(model: Any) -> Iterator[tuple[Path, str]]:
    """Folders, links resolved, that may not go, and what they are."""
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
    """The folder that ``model`` names or was loaded from, links resolved, if it is one."""
    named = (
        model if isinstance(model, (str, os.PathLike)) else getattr(getattr(model, "config", None), "_name_or_path", "")
    )
    return Path(os.path.realpath(named)) if named and os.path.isdir(named) else None
