"""The choice of the implementation that serves a call of an op.

An op is one file, ``msp/ops/<op>.py``. A new op looks like this::

    def reference(weight: Tensor, n: int) -> Tensor:     # plain torch, reads like the formula
        ...

    op = Op("nm_example", reference)                      # the reference fixes the signature

    @op.backend("triton")                                 # same signature, checked by mypy
    def triton(weight: Tensor, n: int) -> Tensor:
        from msp.triton_kernels import nm_example as kernels   # imported only on use

        return kernels.nm_example(weight, n)

    @torch.library.custom_op("msp::nm_example", mutates_args=())
    def nm_example_op(weight: Tensor, n: int) -> Tensor:
        return op(weight, n)                              # chosen by the first tensor's device

    @nm_example_op.register_fake
    def _(weight: Tensor, n: int) -> Tensor:
        return torch.empty_like(weight)

    def nm_example(weight: Tensor, n: int) -> Tensor:     # public: checks first, then the custom op
        ...

Backends are named ``reference``, ``triton``, ``cpu`` and ``cuda``. By default ``triton`` needs Triton and a GPU (or its
interpreter), and ``cpu`` and ``cuda`` need a function with the op's name in the compiled module ``msp._cpu`` or
``msp._cuda``. ``available`` replaces that rule, and ``supports`` lets a backend decline single calls by their
arguments. The automatic choice takes the first backend in ``AUTOMATIC`` that is registered, available and supports the
call. A forced backend that cannot serve is an error, so a test or benchmark never measures another backend than it
names. An op whose weight may have several forms in memory has backends for each, under one name (``Op.form``).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from msp.errors import UsageError
from msp.ops._compiled import check_required, compiled_module

P = ParamSpec("P")
T = TypeVar("T")
Q = ParamSpec("Q")
U = TypeVar("U")

BACKENDS = ("cuda", "cpu", "triton", "reference")
# The values of MSP_ISA for the cpu backend.
ISAS = ("amx", "avx512bf16", "avx512", "avx2", "scalar")

# Per device type, in order of preference. Triton in its interpreter is a test tool and never chosen automatically.
AUTOMATIC: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "xpu": ("triton", "reference"),
    "cpu": ("cpu", "reference"),
}

_forced: ContextVar[str | None] = ContextVar("msp_forced_backend", default=None)
_ops: dict[str, Op[..., Any]] = {}


def cuda_serves(function: str) -> bool:
    """Whether ``msp._cuda`` has this function and can run on the GPUs here.

    The module has a CUDA runtime of its own, which may need a newer driver than torch's.
    """
    compiled: Any = compiled_module("msp._cuda")
    return hasattr(compiled, function) and torch.cuda.is_available() and bool(compiled.usable())


def triton_is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter; it must be set before the first import of Triton."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_available() -> bool:
    return _has_triton() and (torch.cuda.is_available() or torch.xpu.is_available() or triton_is_interpreted())


def _serves_device(backend: str, device_type: str) -> bool:
    """Whether ``backend`` can read tensors of this device type at all."""
    if backend == "reference":
        return True
    if backend == "triton":
        return device_type in ("cuda", "xpu") or (device_type == "cpu" and triton_is_interpreted())
    return backend == device_type


@dataclass(frozen=True)
class _Backend:
    function: Callable[..., Any]
    available: Callable[[], bool]
    supports: Callable[..., bool] | None

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self.supports is None or self.supports(*args, **kwargs)


class Op(Generic[P, T]):
    """The implementations of one op by backend name; calling it runs the one that serves the call.

    An op whose weight may lie in memory in several forms has implementations for each, see ``form``.
    """

    def __init__(self, name: str, reference: Callable[P, T]) -> None:
        self.name = name
        self._begin("", reference, ContextVar(f"msp_last_backend_{name}", default=None))
        _ops[name] = self

    def _begin(self, of_weights: str, reference: Callable[P, T], last: ContextVar[str | None]) -> None:
        self._of_weights = of_weights
        self._backends: dict[str, _Backend] = {}
        self.forms: dict[str, Op[..., Any]] = {}
        self._last = last
        self.register("reference", reference)

    def form(self, form: str, reference: Callable[Q, U]) -> Op[Q, U]:
        """The same op for weights in another form, with a signature and backends of its own.

        It has no public name: ``last_backend`` and ``available_backends`` count it in under the op's name.
        """
        other: Op[Q, U] = Op.__new__(Op)
        other.name = self.name
        other._begin(f" of a weight in {form}", reference, self._last)
        self.forms[form] = other
        return other

    def register(
        self,
        backend: str,
        function: Callable[P, T],
        *,
        available: Callable[[], bool] | None = None,
        supports: Callable[P, bool] | None = None,
    ) -> None:
        """Register ``function`` as ``backend`` of this op.

        Args:
            backend: one of ``BACKENDS``.
            function: takes the arguments of the reference.
            available: whether this machine can run it; the module docstring has the defaults.
            supports: given a call's arguments, whether this backend takes them; default: all.
        """
        if backend not in BACKENDS:
            raise UsageError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
        always = functools.partial(bool, True)
        defaults: dict[str, Callable[[], bool]] = {
            "reference": always,
            "triton": _triton_available,
            "cpu": lambda: hasattr(compiled_module("msp._cpu"), self.name),
            "cuda": functools.partial(cuda_serves, self.name),
        }
        self._backends[backend] = _Backend(function, available or defaults[backend], supports)

    def backend(
        self,
        backend: str,
        *,
        available: Callable[[], bool] | None = None,
        supports: Callable[P, bool] | None = None,
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """``register`` as a decorator."""

        def decorate(function: Callable[P, T]) -> Callable[P, T]:
            self.register(backend, function, available=available, supports=supports)
            return function

        return decorate

    def available(self) -> tuple[str, ...]:
        """The registered backends this machine can run, fastest first; those of other forms are not among them."""
        return tuple(name for name in BACKENDS if name in self._backends and self._backends[name].available())

    def available_for_any(self) -> tuple[str, ...]:
        """The same for a weight in whatever form."""
        found = set(self.available()).union(*(of.available() for of in self.forms.values()))
        return tuple(name for name in BACKENDS if name in found)

    def last(self) -> str | None:
        return self._last.get()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        name = self._choose(first.device.type, args, kwargs)
        result: T = self._backends[name].function(*args, **kwargs)
        self._last.set(name)
        return result

    def note(self, backend: str) -> None:
        """Let ``last_backend`` say ``backend`` of a product that was computed without a call of this object."""
        self._last.set(backend)

    def by_reference(self, function: Callable[..., T], x: Tensor, *args: Any) -> T:
        """Call ``function`` in place of the reference, for arguments that no backend takes.

        Raises:
            UsageError: another backend was forced.
        """
        forced = _forced.get() or _forced_by_environment()
        if forced not in (None, "reference"):
            raise UsageError(f"{self.name}: backend {forced!r} was forced, but only the reference takes coded values")
        result = function(x, *args)
        self._last.set("reference")
        return result

    def _choose(self, device_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        forced = _forced.get() or _forced_by_environment()
        if forced is not None:
            self._require(forced, device_type, args, kwargs)
            return forced
        for name in AUTOMATIC.get(device_type, ()):
            backend = self._backends.get(name)
            if backend is not None and backend.available() and backend.takes(args, kwargs):
                return name
        return "reference"

    def _require(self, name: str, device_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        backend = self._backends.get(name)
        if backend is None:
            reason = "it has no such implementation"
        elif not backend.available():
            reason = "this machine or installation lacks it"
        elif not _serves_device(name, device_type):
            reason = f"it cannot serve tensors on {device_type}"
        elif not backend.takes(args, kwargs):
            reason = "it does not support these arguments"
        else:
            return
        available = ", ".join(self.available())
        op = f"{self.name}{self._of_weights}"
        raise UsageError(f"{op}: backend {name!r} was forced, but {reason}; available: {available}")


_library = torch.library.Library("msp", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The torch op ``msp::<name>``, as ``torch.library.custom_op`` makes it, but 4 us cheaper in every call.

    Args:
        schema: ``name(Tensor x, int n) -> Tensor``; nothing may be mutated or returned.
        implementation: takes the arguments in order, on every device.
        fake: the same for tensors without data.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    # as in custom_op: a compiler that gave up on the calling frame would otherwise try to compile this one
    opaque = torch._disable_dynamo(implementation)  # type: ignore[attr-defined]
    _library.impl(name, opaque, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"msp::{name}", fake, lib=_library)
    return getattr(torch.ops.msp, name).default


def _forced_by_environment() -> str | None:
    name = os.environ.get("MSP_BACKEND", "").strip().lower()
    if name in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise UsageError(f"MSP_BACKEND={name} is not one of {', '.join(BACKENDS)}")
    return name


def check_environment(device_type: str) -> None:
    """Raise early the errors of ``MSP_BACKEND``, ``MSP_ISA`` or ``MSP_REQUIRE`` that ops on this device would raise.

    Raises:
        UsageError: the variable has an unknown value, or names something that this machine or installation lacks, or a
            backend that serves other devices or that no op has.
        MspError: a compiled module in ``MSP_REQUIRE`` does not import.
    """
    check_required()
    name = _forced_by_environment()
    if name is not None and not _serves_device(name, device_type):
        raise UsageError(f"MSP_BACKEND={name} cannot serve tensors on {device_type}")
    if name is not None and not any(name in op.available() for op in _ops.values()):
        raise UsageError(f"MSP_BACKEND={name} was asked for, but this machine or installation lacks it")
    compiled = compiled_module("msp._cpu")
    if compiled is not None and device_type == "cpu":
        try:
            compiled.isa()
        except RuntimeError as error:  # names the variable and the sets of this machine
            raise UsageError(f"{error} (of {', '.join(ISAS)})") from error


@contextmanager
def force_backend(name: str | None) -> Iterator[None]:
    """Within the context backend ``name`` serves every op, in this thread or task only.

    ``None`` leaves the choice to an outer ``force_backend``, ``MSP_BACKEND`` or the automatic rule.

    Raises:
        UsageError: ``name`` is no backend's name. If a backend exists but cannot serve a call, that call raises one
            too.
    """
    if name is not None and name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    token = _forced.set(name or _forced.get())
    try:
        yield
    finally:
        _forced.reset(token)


def last_backend(op: str) -> str | None:
    """The backend that served the last call of ``op`` in this thread or task; None before the first."""
    return _find(op).last()


def available_backends(op: str) -> tuple[str, ...]:
    """The backends of ``op`` that this machine can run, fastest first; ``reference`` is always there."""
    return _find(op).available_for_any()


def _find(op: str) -> Op[..., Any]:
    if op not in _ops:
        raise UsageError(f"op {op!r} is not one of {', '.join(sorted(_ops))}")
    return _ops[op]
