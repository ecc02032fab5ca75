"""Console helpers shared by all commands: one-sentence errors and highlighted text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .compressors import CompressedPassage


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn the errors that are written for users into one line and exit status 2."""
    try:
        yield
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        from rich.console import Console

        Console(stderr=True).print(f"[bold red]Error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def highlight(text: str, found: CompressedPassage) -> Any:
    """The original text as a `rich.text.Text`, what a text compressor kept in bold and the rest dim."""
    from rich.text import Text

    shown = Text(text, style="dim")
    for start, end in found.spans or ():
        shown.stylize("not dim bold green", start, end)
    return shown if found.spans is not None else Text(found.text or "")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
