"""Compressors: passages in, compressed passages out, and the reader that reads them."""

from __future__ import annotations

if __name__ != "nutgraf.compressors":
    # Under a bare name this would be a second copy of every class and of the registry.
    raise ImportError(f"Import nutgraf.compressors, not {__name__}: the repository root is the package nutgraf.")

from . import kv, soft, text
from .base import Compressor, SoftCompressor, TextCompressor
from .core.config import CompressorConfig
from .core.errors import CheckpointError, ReaderMismatchError
from .core.passage import CompressedPassage
from .core.shipped import pretrained
from .fidelity.gate import FidelityGate
from .fidelity.probes import FidelityConfig
from .loading import load_compressor
from .reader.reader import Reader, Targets
from .registry import COMPRESSORS, import_methods, make_compressor, register_compressor

import_methods(soft, kv, text)  # a new method needs no entry here

__all__ = [
    "COMPRESSORS",
    "CheckpointError",
    "CompressedPassage",
    "Compressor",
    "CompressorConfig",
    "FidelityConfig",
    "FidelityGate",
    "Reader",
    "ReaderMismatchError",
    "SoftCompressor",
    "Targets",
    "TextCompressor",
    "load_compressor",
    "make_compressor",
    "pretrained",
    "register_compressor",
]
