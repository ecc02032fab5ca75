"""The store of compressed passages: made once, when a passage is indexed, and read as often as it is retrieved.

A `MemoryStore` lasts as long as its script; a `LanceStore` (``pip install nutgraf[store]``) is a folder, shared by threads
and processes. Both have one interface, `PassageStore`. A passage is found by its text and by who made it for whom: a
changed compressor or reader has other keys, so that what they make is never mixed.

Example::

    store = LanceStore("passages")
    fill(store, compressor, texts)                      # compresses what is not stored yet
    passages = store.get_many(keys_for(compressor, texts))
"""

from __future__ import annotations

from typing import Any

from .base import Entry, Hit, Maker, MakerStats, PassageKey, PassageStore, StoreError, StoreStats
from .codec import Encoding
from .fill import Filled, explain_missing, fill, get_or_compress, keys_for
from .memory import MemoryStore

__all__ = [
    "Encoding",
    "Entry",
    "Filled",
    "Hit",
    "LanceStore",
    "Maker",
    "MakerStats",
    "MemoryStore",
    "PassageKey",
    "PassageStore",
    "StoreError",
    "StoreStats",
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
