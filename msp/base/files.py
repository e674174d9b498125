"""Writes single files in one step, such that others may read them too."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from msp.base.staging import put_in_place, staged
from msp.errors import MspError, system_reason


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Another path to write a file to, which takes the place of ``path`` when the context ends well.

    It reaches the disk before, so that neither a kill nor a power cut leaves a part of a file. A link is followed; a
    pipe or a terminal is written to as it is. Missing folders are made.

    Raises:
        MspError: what is done in the context cannot be written, and ``path`` is as before; or another process is
            writing it.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(target) as new:
            yield new
            if target.is_file():
                shutil.copymode(target, new)
            put_in_place(new, target)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def unwritable(path: str | Path, error: Exception) -> MspError:
    """What to raise where ``path`` cannot be written: it names the file and the reason."""
    return MspError(f"{path} cannot be written: {system_reason(error)}")


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text in one step; errors as of ``replacing``."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one step; errors as of ``replacing``."""
    with replacing(path) as new:
        save_tensors(tensors, new, metadata=metadata)


def save_tensors(tensors: Mapping[str, Tensor], file: str | Path, *, metadata: dict[str, str] | None = None) -> None:
    """``safetensors.torch.save_file``, readable by whom the umask says: on its own it lets in the owner alone.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    save_file(dict(tensors), file, metadata=metadata)
    open_to_readers(Path(file))


def name_alone(path: str | Path) -> str:
    """The name of a file or folder without those it lies in; text that is no path to one is returned as it is.

    What is written must not depend on where things lie.
    """
    return os.path.basename(os.path.abspath(path)) if os.path.exists(path) else str(path)


def open_to_readers(path: Path) -> None:
    """Give a file, or all files below a folder, the permissions of a file that Python creates there.

    Raises:
        OSError: one that cannot be changed.
    """
    with tempfile.TemporaryDirectory(dir=path if path.is_dir() else path.parent, prefix=".msp-") as place:
        probe = Path(place) / "probe"
        probe.touch()  # to read the umask itself is to change it, for all threads
        mode = stat.S_IMODE(probe.stat().st_mode)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(mode)
