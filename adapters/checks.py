"""Checks of arguments that several adapters share."""

from __future__ import annotations

from typing import Any

from ..compressors import Compressor


def check_compressor(compressor: object) -> None:
    """Raise ``TypeError`` for anything but a compressor."""
    if not all(hasattr(compressor, name) for name in ("compress", "interface", "fingerprint")):
        raise TypeError(f"compressor must be a nutgraf compressor, got {type(compressor).__name__}.")


def with_budget(compressor: Compressor, ratio: float | None, max_tokens: int | None) -> Compressor:
    """Return the compressor, with ``max_tokens`` as its budget if given.

    Raises:
        ValueError: if there is a ratio too, or the compressor does not give text.
    """
    if max_tokens is None:
        return compressor
    if ratio is not None:
        raise ValueError(f"Give ratio or max_tokens, not both (got {ratio} and {max_tokens}).")
    if not hasattr(compressor, "with_settings"):
        raise ValueError(
            f"max_tokens needs a compressor to text with a budget, and {type(compressor).__name__} gives "
            f"{compressor.interface}; use ratio."
        )
    selecting: Any = compressor
    return selecting.with_settings(max_tokens=max_tokens)


def check_reader(reader: object) -> None:
    """Raise ``TypeError`` for anything but a `Reader` or a `nutgraf.adapters.openai.ServedReader`."""
    if not all(hasattr(reader, name) for name in ("generate", "stream", "fingerprint")):
        raise TypeError(
            f"reader must be a nutgraf Reader or ServedReader, got {type(reader).__name__}; see Reader.from_pretrained."
        )
