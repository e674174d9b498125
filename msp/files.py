"""Writes tensors into files that others may read too."""

from __future__ import annotations

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
