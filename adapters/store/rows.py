"""Rows of a store's table: entries on their way in and out."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Entry, PassageKey

PLACE = ("header", "slab", "start", "nbytes", "crc")
_TEXT = "nutgraf:text"  # the place in ``about`` of a text that Arrow cannot hold


@dataclass
class Place:
    """Where a passage's slots stand. ``known_good``: its checksum was seen to be right."""

    header: dict[str, Any]
    slab: str | None
    start: int
    nbytes: int
    crc: int
    known_good: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Place:
        """The place that a row with the columns `PLACE` names."""
        return cls(json.loads(row["header"]), row["slab"], row["start"] or 0, row["nbytes"], row["crc"])


def row_of(entry: Entry, header: str, data: bytes) -> dict[str, Any]:
    """An entry's row but for where its slots stand and for its retrieval vector."""
    key, passage = entry.key, entry.passage
    about = dict(entry.about or {})
    text = entry.text
    if text is not None and not _is_utf8(text):
        about[_TEXT], text = text, None  # JSON, unlike Arrow, can hold the lone surrogates of a badly decoded text
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
        "text": text,
        "about": json.dumps(about) if about else None,
        "header": header,
        "nbytes": len(data),
        "crc": zlib.crc32(data),
    }


def key_of(row: Mapping[str, Any]) -> PassageKey:
    """The key of a row."""
    return PassageKey(row["text_hash"], row["compressor"], row["reader"], row["ratio"], row["query_hash"])


def text_and_about(row: Mapping[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """A row's original text and the caller's own facts."""
    about = json.loads(row["about"]) if row["about"] else {}
    text = about.pop(_TEXT, row["text"])
    return text, about or None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
