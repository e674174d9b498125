"""What ties msp to other libraries; each is imported only when it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Teach transformers the packed format: now if its quantizers are imported, else as soon as they are.

    Importing them here would cost every ``import msp``, and so every ``msp --help``, several seconds.
    """
    if QUANTIZERS in sys.modules and not getattr(sys.modules[QUANTIZERS].__spec__, "_initializing", False):
        importlib.import_module("msp.integrations.transformers")
    # by name: after a reload of msp the finder that is there is of the class that was
    elif not any(type(finder).__name__ == _RegisterAfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Finds one module the way the other finders do, and registers the format once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module("msp.integrations.transformers")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
