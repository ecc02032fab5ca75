"""Conversion between entries and rows of a store's table."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import TEXT, Entry, Facts, PassageKey
from .encryption import Cipher

KEY = ("text_hash", "compressor", "reader", "ratio", "query_hash")
PLACE = ("header", "slab", "start", "nbytes", "crc")


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
    def of(cls, row: Mapping[str, Any], cipher: Cipher | None = None) -> Place:
        """Read the place from a row with the columns `key` and `PLACE`."""
        header = row["header"] if cipher is None else cipher.open_text(row["header"], f"{row['key']}/header")
        return cls(json.loads(header), row["slab"], row["start"] or 0, row["nbytes"], row["crc"])


def row_of(entry: Entry, header: str, data: bytes, cipher: Cipher | None = None) -> dict[str, Any]:
    """Return an entry's row without the place of its slots and its retrieval vector; with a cipher, `data` is sealed."""
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
        **text_columns(entry.facts, key.id, cipher),
        "header": header if cipher is None else cipher.seal_text(header, f"{key.id}/header"),
        "nbytes": len(data),
        "crc": zlib.crc32(data),
    }


def text_columns(facts: Facts, key: str, cipher: Cipher | None = None) -> dict[str, str | None]:
    """Return the columns of the text and of the caller's facts. With a cipher the vector is sealed together with them."""
    about = dict(facts.about or {})
    if cipher is not None:
        whole = json.dumps({"text": facts.text, "about": about, "vector": facts.vector})
        return {"text": None, "about": cipher.seal_text(whole, f"{key}/facts")}
    text = facts.text
    if text is not None and not _is_utf8(text):
        about[TEXT], text = text, None  # JSON can hold lone surrogates, Arrow cannot
    return {"text": text, "about": json.dumps(about) if about else None}


def key_of(row: Mapping[str, Any]) -> PassageKey:
    """Return the key of a row."""
    return PassageKey(*(row[name] for name in KEY))


def facts_of(row: Mapping[str, Any], vector: Any = None, cipher: Cipher | None = None) -> Facts:
    """Return what a row holds besides the slots; with a cipher it needs the column `key`."""
    if cipher is not None:
        return Facts(**json.loads(cipher.open_text(row["about"] or "", f"{row['key']}/facts")))
    about = json.loads(row["about"]) if row["about"] else {}
    text = about.pop(TEXT, row["text"])
    return Facts(text, vector, about)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
