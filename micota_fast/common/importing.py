"""Imports at the time of use, by places that are written as "module:name"."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def imported(place: str) -> Any:
    """Return what "module:name" names, or the module that "module" names, and import the module for it."""
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


class _CallablePackage(ModuleType):
    _function: str

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function; `inspect.signature` finds it here."""
        function: Callable[..., Any] = imported(self._function)
        return function

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__wrapped__(*arguments, **keywords)


def make_callable(package: str, function: str) -> None:
    """Let a package be called as a function: `micota_fast.train(config)` next to `micota_fast.train.loop`.

    A function in the package's place would be replaced by the package as soon as a module of it is imported.

    Args:
        package: its `__name__`; it is being imported.
        function: "module:name", imported at the first call.
    """
    module = sys.modules[package]
    module.__class__ = _CallablePackage
    module._function = function  # type: ignore[attr-defined]
