"""Original texts of documents whose content an adapter has replaced."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ..store.base import sha256
from .placeholder import PlaceholderError, holds_placeholder, is_placeholder

ORIGINAL_TEXT = "original_text"
SPARE = "nutgraf_original_text"  # for documents with an entry of their own of that name
_MAX_ISSUED = 2**16
_ISSUED: OrderedDict[tuple[str, str], None] = OrderedDict()  # hashes of contents and their original texts
_LOCK = threading.Lock()


def keep_original(metadata: Mapping[str, Any], content: str, text: str) -> dict[str, Any]:
    """Return metadata with a document's original text, and remember that ``content`` was made of it.

    The entry is "original_text"; if the document has another one of that name, "nutgraf_original_text".
    """
    with _LOCK:
        _ISSUED[sha256(content), sha256(text)] = None
        while len(_ISSUED) > _MAX_ISSUED:
            _ISSUED.popitem(last=False)
    return {**metadata, ORIGINAL_TEXT if metadata.get(ORIGINAL_TEXT, text) == text else SPARE: text}


def original_of(content: str, metadata: Mapping[str, Any]) -> str:
    """Return the text that a document's content was made of: the content itself unless it was compressed before.

    Raises:
        PlaceholderError: if the content has a genuine placeholder and the metadata lack the original text.
    """
    texts = [text for name in (SPARE, ORIGINAL_TEXT) if isinstance(text := metadata.get(name), str)]
    if texts and is_placeholder(content):
        return texts[0]
    made_of = [text for text in texts if (sha256(content), sha256(text)) in _ISSUED]
    if made_of:
        return made_of[0]
    if holds_placeholder(content):
        raise PlaceholderError(
            "A document was compressed before: its content has the placeholder of a compressed passage, and its metadata lack "
            f"the original text ({ORIGINAL_TEXT!r}). Give the retrieved documents to the compressor, once and last."
        )
    return content
