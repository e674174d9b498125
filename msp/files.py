"""Writes tensors into files that others may read too."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


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
