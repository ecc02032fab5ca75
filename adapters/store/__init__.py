"""Stores of compressed passages: written once, at indexing time, and read at every retrieval.

A `MemoryStore` lasts as long as its process. A `LanceStore` (``pip install nutgraf[store]``) is a folder or a bucket, shared
by threads and processes. Both implement `PassageStore`. The key of a passage includes the fingerprints of its compressor and
reader, so passages of a changed compressor or reader are never mixed.

Example::

    store = LanceStore("passages")
    fill(store, compressor, texts)                      # compresses what is not stored yet
    passages = store.get_many(keys_for(compressor, texts))
"""

from __future__ import annotations

from typing import Any

from .base import (
    Entry,
    Facts,
    Hit,
    Listed,
    Maker,
    MakerStats,
    PassageKey,
    PassageStore,
    StoreError,
    StoreStats,
    documents,
)
from .codec import Encoding
from .fill import Filled, explain_missing, fill, get_or_compress, keys_for
from .memory import MemoryStore

__all__ = [
    "Encoding",
    "Entry",
    "Facts",
    "Filled",
    "Hit",
    "LanceStore",
    "Listed",
    "Maker",
    "MakerStats",
    "MemoryStore",
    "PassageKey",
    "PassageStore",
    "StoreError",
    "StoreStats",
    "documents",
    "explain_missing",
    "fill",
    "get_or_compress",
    "keys_for",
]


def __getattr__(name: str) -> Any:
    if name != "LanceStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .lance import LanceStore  # lancedb is an extra, and takes half a second to import

    return LanceStore
