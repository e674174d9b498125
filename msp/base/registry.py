"""Things that a user names: pruners and allocators, built in or of the user's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from msp.errors import UsageError

Thing = TypeVar("Thing")
Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(Generic[Thing]):
    """Factories by name.

    Args:
        kind: the word for one thing in messages, like ``pruner``.
        needs: the attributes that an object of the user's must have to serve as one.
    """

    def __init__(self, kind: str, needs: tuple[str, ...]) -> None:
        self.kind = kind
        self.needs = needs
        self.factories: dict[str, Callable[..., Thing]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self.factories))

    def register(self, factory: Factory) -> Factory:
        """Register ``factory``, a class or a function, under its attribute ``name``; usable as a decorator.

        Raises:
            UsageError: the factory has no name, or another one has that name.
        """
        name = getattr(factory, "name", None)
        if not isinstance(name, str) or not name:
            raise UsageError(f"{factory!r} cannot be registered as {self.kind}: it has no `name`")
        known = self.factories.get(name)
        if known is not None and _origin(known) != _origin(factory):
            raise UsageError(f"{self.kind} {name!r} is registered already: {_origin(known)}")
        self.factories[name] = factory
        return factory

    def get(self, name: str | Thing, **options: Any) -> Thing:
        """The thing ``name``, made with ``options``; an object that can serve as one is returned as it is.

        Raises:
            UsageError: the name or an option is unknown, a value is out of range, or the object cannot serve.
        """
        if not isinstance(name, str):
            if isinstance(name, type):
                raise UsageError(f"{name.__name__} is a class: give one of its objects as {self.kind}")
            if lacking := [attribute for attribute in self.needs if not hasattr(name, attribute)]:
                raise UsageError(f"{name!r} cannot serve as {self.kind}: it has no {', '.join(lacking)}")
            return name
        if name not in self.factories:
            raise UsageError(f"{self.kind} {name!r} is not one of {', '.join(self.names)}")
        factory = self.factories[name]
        known = inspect.signature(factory).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        if unknown := [] if takes_any else [option for option in options if option not in known]:
            choice = ", ".join(known) if known else "none"
            raise UsageError(f"{self.kind} {name!r} has no option {unknown[0]!r}; its options: {choice}")
        return factory(**options)


def _origin(factory: Callable[..., Any]) -> str:
    """The qualified name of a factory; a module that is loaded again may register its things again."""
    return f"{factory.__module__}.{factory.__qualname__}"
