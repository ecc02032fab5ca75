"""Compressors: passages in, compressed passages out, and the reader that reads them."""

from __future__ import annotations

if __name__ != "nutgraf.compressors":
    # Under a bare name this would be a second copy of every class and of the registry.
    raise ImportError(f"Import nutgraf.compressors, not {__name__}: the repository root is the package nutgraf.")

from . import (  # each registers its method
    autocompressor,
    full_text,
    gist,
    icae,
    kv_memory,
    llmlingua,
    llmlingua2,
    longllmlingua,
    mean_pool,
    pisco,
    salient_pool,
    selective_context,
    xrag,
)
from .base import Compressor, CompressorConfig, ReaderMismatchError, SoftCompressor, TextCompressor
from .checkpoint import CheckpointError
from .fidelity import FidelityGate
from .passage import CompressedPassage
from .probing import FidelityConfig
from .reader import Reader
from .registry import COMPRESSORS, load_compressor, make_compressor, register_compressor
from .targets import Targets

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
