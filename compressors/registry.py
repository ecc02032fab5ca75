"""Maps method names to compressor classes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any, TypeVar

from .base import Compressor
from .reader.reader import Reader

COMPRESSORS: dict[str, type[Compressor]] = {}
T = TypeVar("T", bound=type[Compressor])


def register_compressor(cls: T) -> T:
    """Class decorator that registers a compressor under its config's ``method`` name."""
    name = cls.config_class.method
    if name in COMPRESSORS and COMPRESSORS[name].__qualname__ != cls.__qualname__:
        raise ValueError(f"The method name {name!r} is already taken by {COMPRESSORS[name].__name__}.")
    COMPRESSORS[name] = cls
    return cls


def import_methods(*packages: ModuleType) -> None:
    """Imports every module of some packages, so that their methods register themselves."""
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def compressor_class(method: str) -> type[Compressor]:
    """The class of a method. Raises ``ValueError`` with the known names otherwise."""
    if method not in COMPRESSORS:
        raise ValueError(f"Unknown compression method {method!r}; known are {sorted(COMPRESSORS)}.")
    return COMPRESSORS[method]


def make_compressor(method: str, reader: Reader, **settings: Any) -> Compressor:
    """Creates an untrained compressor.

    Args:
        method: a registered name, such as ``"icae"``.
        reader: the reader of its passages.
        settings: fields of the method's config class, and further arguments of its constructor (``embedder=`` of xRAG).

    Raises:
        ValueError: for an unknown method or an unknown setting.
    """
    cls = compressor_class(method)
    extra = set(inspect.signature(cls.__init__).parameters) - {"self", "config", "reader"}
    config = cls.config_class.from_dict({k: v for k, v in settings.items() if k not in extra})
    return cls(config, reader, **{k: v for k, v in settings.items() if k in extra})
