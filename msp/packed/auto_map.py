"""Lets transformers load a packed model without an import of msp: with ``trust_remote_code=True``.

A packed model holds a small file that ``auto_map`` in its ``config.json`` names. transformers runs it only if remote
code is trusted. The file imports msp and returns transformers' own configuration. Without trust, transformers neither
asks nor runs anything, because it has the model type itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "load_with_msp"
FILE = f"{NAME}.py"
# transformers searches a file for imports and names the distribution after the module, but that is another project's
# name. It leaves out imports in a try block.
SOURCE = '''"""Imports msp, which this packed model needs. transformers runs this file with trust_remote_code=True."""

try:
    from msp.integrations.auto_map import PackedConfig
except ImportError as error:
    raise ImportError("this model is packed by msp: pip install mixed-sparsity-pruning") from error
'''


class PackedConfig:
    """The entry in ``auto_map`` for the class that transformers would choose anyway."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """transformers calls this to save the file of remote code with the model; msp writes the file itself."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Any:
        """The configuration at ``source``, of transformers' own class."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source, **{**options, "trust_remote_code": False})


def add_loader(folder: Path) -> None:
    """Write the file next to ``config.json`` and name it there, unless the model brings a configuration of its own."""
    from transformers import CONFIG_MAPPING

    from msp.base.reading import read_object
    from msp.models.travelling import edit_config

    config = read_object(folder / "config.json", foreign=True)
    auto_map, kind = config.get("auto_map") or {}, config.get("model_type")
    known = (
        isinstance(kind, str) and kind in CONFIG_MAPPING and CONFIG_MAPPING[kind].__module__.startswith("transformers.")
    )
    if not known or "AutoConfig" in auto_map:
        return
    edit_config(folder, auto_map={**auto_map, "AutoConfig": f"{NAME}.{PackedConfig.__name__}"})
    (folder / FILE).write_text(SOURCE, encoding="utf-8")


def is_loader(reference: object) -> bool:
    """Whether an entry of ``auto_map`` names the file of msp; an entry from a hub begins with ``repository--``."""
    return isinstance(reference, str) and reference.rpartition("--")[2] == f"{NAME}.{PackedConfig.__name__}"


def forget_loader(config: Any) -> None:
    """Remove the entry from a configuration that was read, since a later save of it does not write the file."""
    auto_map = getattr(config, "auto_map", None) or {}
    kept = {name: reference for name, reference in auto_map.items() if not is_loader(reference)}
    if kept:
        config.auto_map = kept
    elif auto_map:
        del config.auto_map
