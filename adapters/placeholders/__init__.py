"""Placeholders: short strings that stand for compressed passages inside a framework's prompts."""

from __future__ import annotations

from .cache import CacheStats, PassageCache
from .placeholder import PlaceholderError, PlaceholderStore, escape_placeholders, read_placeholders, shared_store

__all__ = [
    "CacheStats",
    "PassageCache",
    "PlaceholderError",
    "PlaceholderStore",
    "escape_placeholders",
    "read_placeholders",
    "shared_store",
]
