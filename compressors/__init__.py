"""Compressors: passages in, compressed passages out, and the reader that reads them."""

from __future__ import annotations

if __name__ != "nutgraf.compressors":
    # Under a bare name this would be a second copy of every class and of the registry.
    raise ImportError(f"Import nutgraf.compressors, not {__name__}: the repository root is the package nutgraf.")

from .base import Compressor, SoftCompressor, TextCompressor
from .core.config import CompressorConfig
from .core.errors import CheckpointError, ReaderMismatchError
from .core.passage import CompressedPassage
from .fidelity.gate import FidelityGate
from .fidelity.probes import FidelityConfig
from .kv import five_hundred as kv_memory
from .kv import gist
from .kv import match as kv_match
from .loading import load_compressor
from .reader.reader import Reader, Targets
from .registry import COMPRESSORS, make_compressor, register_compressor
from .soft import autocompressor, full_text, icae, mean_pool, pisco, salient_pool, xrag
from .text import llmlingua, llmlingua2, longllmlingua, selective_context

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
    "autocompressor",
    "full_text",
    "gist",
    "icae",
    "kv_match",
    "kv_memory",
    "llmlingua",
    "llmlingua2",
    "load_compressor",
    "longllmlingua",
    "make_compressor",
    "mean_pool",
    "pisco",
    "register_compressor",
    "salient_pool",
    "selective_context",
    "xrag",
]
