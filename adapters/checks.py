"""Checks of arguments that several adapters share."""

from __future__ import annotations


def check_compressor(compressor: object) -> None:
    """Raise ``TypeError`` for anything but a compressor."""
    if not all(hasattr(compressor, name) for name in ("compress", "interface", "fingerprint")):
        raise TypeError(f"compressor must be a nutgraf compressor, got {type(compressor).__name__}.")


def check_reader(reader: object) -> None:
    """Raise ``TypeError`` for anything but a `Reader` or a `nutgraf.adapters.openai.ServedReader`."""
    if not all(hasattr(reader, name) for name in ("generate", "stream", "fingerprint")):
        raise TypeError(
            f"reader must be a nutgraf Reader or ServedReader, got {type(reader).__name__}; see Reader.from_pretrained."
        )
