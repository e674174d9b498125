"""The connections of msp to other libraries; each is imported only when it is used."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"
PEFT = "peft"


def register_with_transformers() -> None:
    """Register the packed format with transformers: now if its quantizers are imported, else as soon as they are.

    Importing them here would cost every ``import msp``, and so every ``msp --help``, several seconds.
    """
    _after_import(QUANTIZERS, "msp.packed.hf_quantizer")


def register_with_peft() -> None:
    """Register LoRA on packed linears with peft, now or as soon as peft is imported."""
    _after_import(PEFT, "msp.integrations.peft")


def _after_import(module: str, integration: str) -> None:
    if module in sys.modules and not getattr(sys.modules[module].__spec__, "_initializing", False):
        _integrate(integration)
    # by name: after a reload of msp, the existing finder belongs to the old class
    elif not any(
        type(finder).__name__ == _RegisterAfterImport.__name__ and getattr(finder, "module", None) == module
        for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _RegisterAfterImport(module, integration))


def _integrate(integration: str) -> None:
    try:
        importlib.import_module(integration)
    except (ImportError, AttributeError) as error:
        if integration != "msp.integrations.peft":
            raise
        # the program that imports peft may not use packed models at all
        warnings.warn(f"this peft is not one that msp knows; no LoRA on packed linears: {error}", stacklevel=2)


class _RegisterAfterImport(MetaPathFinder):
    """Finds one module as the other finders do, and imports its registering module once it is imported."""

    def __init__(self, module: str, integration: str) -> None:
        self.module = module
        self.integration = integration

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _integrate(self.integration)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
