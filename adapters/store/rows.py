"""Conversion between entries and rows of a store's table."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Entry, Facts, PassageKey

KEY = ("text_hash", "compressor", "reader", "ratio", "query_hash")
PLACE = ("header", "slab", "start", "nbytes", "crc")
_TEXT = "nutgraf:text"  # key in ``about`` for a text that Arrow cannot hold


@dataclass
class Place:
    """Place of a passage's slots. ``known_good``: its checksum was verified."""

    header: dict[str, Any]
    slab: str | None
    start: int
    nbytes: int
    crc: int
    known_good: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Place:
        """Read the place from a row with the columns `PLACE`."""
        return cls(json.loads(row["header"]), row["slab"], row["start"] or 0, row["nbytes"], row["crc"])


def row_of(entry: Entry, header: str, data: bytes) -> dict[str, Any]:
    """Return an entry's row without the place of its slots and its retrieval vector."""
    key, passage = entry.key, entry.passage
    return {
        "key": key.id,
        "text_hash": key.text,
        "compressor": key.compressor,
        "reader": key.reader,
        "ratio": key.ratio,
        "query_hash": key.query,
        "interface": passage.interface,
        "source_tokens": passage.source_tokens,
        "slots": passage.slots,
        **text_columns(entry.facts),
        "header": header,
        "nbytes": len(data),
        "crc": zlib.crc32(data),
    }


def text_columns(facts: Facts) -> dict[str, str | None]:
    """Return the columns of the text and of the caller's facts."""
    about = dict(facts.about or {})
    text = facts.text
    if text is not None and not _is_utf8(text):
        about[_TEXT], text = text, None  # JSON can hold lone surrogates, Arrow cannot
    return {"text": text, "about": json.dumps(about) if about else None}


def key_of(row: Mapping[str, Any]) -> PassageKey:
    """Return the key of a row."""
    return PassageKey(*(row[name] for name in KEY))


def facts_of(row: Mapping[str, Any], vector: Any = None) -> Facts:
    """Return what a row holds besides the slots."""
    about = json.loads(row["about"]) if row["about"] else {}
    text = about.pop(_TEXT, row["text"])
    return Facts(text, vector, about)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
