"""Commands from dataclasses of options, and a terminal that is wide enough for their tables."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from rich.console import Console
from typer.models import OptionInfo

from ...console import friendly_errors

T = TypeVar("T")


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Decorator: a command with one parameter per field of `options`, and errors told in a sentence (exit status 2)."""
    hints = get_type_hints(options, include_extras=True)
    parameters = []
    for item in dataclasses.fields(options):  # type: ignore[arg-type]
        default: Any = inspect.Parameter.empty if item.default is dataclasses.MISSING else item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        kind, (base, info) = inspect.Parameter.KEYWORD_ONLY, get_args(hints[item.name])
        if get_origin(base) is list and isinstance(info, OptionInfo):
            info.help = f"{info.help} Repeatable."
        parameters.append(inspect.Parameter(item.name, kind, default=default, annotation=hints[item.name]))

    def wrap(run: Callable[[T], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            with friendly_errors():
                run(options(**given))

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return wrap


def wide_console() -> Console:
    """The terminal; elsewhere, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
