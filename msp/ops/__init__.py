"""The ops: a plain-torch reference and faster backends behind one function each."""

from msp.ops._dispatch import available_backends, force_backend, last_backend

__all__ = ["available_backends", "force_backend", "last_backend"]
