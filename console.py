"""Helpers of all commands: errors in one sentence, and what a text compressor kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .compressors import CompressedPassage


@contextlib.contextmanager
def friendly_errors(*more: type[Exception], stopped: str | None = None) -> Iterator[None]:
    """Print errors written for users in one line and exit with status 2.

    Args:
        more: error types besides ``ValueError``, ``OSError``, ``FloatingPointError`` and ``ImportError``.
        stopped: printed when the user stops the command, which then exits with status 130.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError, *more) as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if stopped is None:
            raise
        typer.echo(stopped, err=True)
        raise typer.Exit(130) from error


def highlight(text: str, found: CompressedPassage) -> Any:
    """Return the original as a `rich.text.Text`: what a text compressor kept in bold, the rest dim."""
    from rich.text import Text

    shown = Text(text, style="dim")
    for start, end in found.spans or ():
        shown.stylize("not dim bold green", start, end)
    return shown if found.spans is not None else Text(found.text or "")
