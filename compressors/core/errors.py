"""Errors that several modules raise."""

from __future__ import annotations


class ReaderMismatchError(ValueError):
    """A compressed passage or a compressor meets a reader that it was not made for."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or do not hold exactly the expected weights."""
