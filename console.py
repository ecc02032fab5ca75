"""Helpers of all commands: errors in one sentence, and what a compressor kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .compressors import CompressedPassage


_BY_NAME = ("SafetensorError", "OutOfMemoryError")  # of libraries that not every command imports


@contextlib.contextmanager
def friendly_errors(*more: type[Exception], stopped: str | None = None) -> Iterator[None]:
    """Print errors written for users in one line and exit with status 2; hide the bars of loading weights.

    Args:
        more: error types besides ``ValueError``, ``OSError``, ``FloatingPointError``, ``ImportError``, damaged safetensors and
            exhausted memory.
        stopped: printed when the user stops the command, which then exits with status 130.
    """
    try:
        with _no_loading_bars():
            yield
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, FloatingPointError, ImportError, MemoryError, *more)) and (
            type(error).__name__ not in _BY_NAME
        ):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        typer.secho(f"Error: {said}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if stopped is None:
            raise
        typer.echo(stopped, err=True)
        raise typer.Exit(130) from error


@contextlib.contextmanager
def _no_loading_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def highlight(text: str, found: CompressedPassage) -> Any:
    """Return the original as a `rich.text.Text`: what a text compressor kept in bold, the rest dim."""
    from rich.text import Text

    shown = Text(text, style="dim")
    for start, end in found.spans or ():
        shown.stylize("not dim bold green", start, end)
    return shown if found.spans is not None else Text(found.text or "")


def highlight_kept(text: str, found: CompressedPassage, offsets: Sequence[tuple[int, int]]) -> Any:
    """Return the text as a `rich.text.Text`: the tokens of which most heads keep their pair in bold, as many as the budget.

    `offsets`: start and end of every token. `found`: a passage with `heads_per_token`.
    """
    from rich.text import Text

    heads: Any = found.heads_per_token
    shown = Text(text, style="dim")
    for token in heads.topk(min(found.slots, len(offsets))).indices.tolist():
        shown.stylize("not dim bold green", *offsets[token])
    return shown
