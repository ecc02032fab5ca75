"""What an LLM is to read in place of retrieved texts, for frameworks that carry strings: shorter texts or placeholders."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ...compressors import CompressedPassage, Compressor
from .placeholder import (
    Issued,
    PlaceholderStore,
    escape_placeholders,
    holds_placeholder,
    read_placeholders,
    shared_store,
)


class TextsForReading:
    """Compresses retrieved texts; what was compressed once is kept. Safe to share by threads.

    Args:
        compressor: compresses the texts.
        ratio: compression ratio L / l in place of the compressor's own.
        query_aware: pass the question to the compressor; default: what the compressor's ``query_aware`` says, or no.
        store: where passages are kept; default: the one that all adapters for the compressor's reader share.

    Raises:
        TypeError: if ``compressor`` is none.
        ValueError: if ``ratio`` is below 1.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: float | None = None,
        query_aware: bool | None = None,
        store: PlaceholderStore | None = None,
    ) -> None:
        if not hasattr(compressor, "compress") or not hasattr(compressor, "interface"):
            raise TypeError(f"compressor must be a nutgraf compressor, got {type(compressor).__name__}.")
        if ratio is not None and not ratio >= 1:
            raise ValueError(f"ratio is source tokens per slot, at least 1, got {ratio!r}.")
        self.compressor = compressor
        self.ratio = ratio
        self.query_aware = compressor.query_aware if query_aware is None else query_aware
        self.store = store or shared_store(compressor.reader.fingerprint)

    def of(self, texts: Sequence[str], query: str | None) -> list[str]:
        """One string a text: with a compressor to ``text`` the shorter text, else a placeholder; "" for no slots.

        Raises:
            ValueError: if the question holds a placeholder.
        """
        if query is not None and holds_placeholder(query):
            raise ValueError(
                "The question holds a placeholder of a compressed passage, which only a copy from a prompt or a log can "
                "bring there; remove it, or run escape_placeholders over the question."
            )
        asked = query if self.query_aware else None
        keys = [self._key(text, asked) for text in texts]
        passages = self.store.cache.get_or_compress(
            keys, lambda places: self._compress([texts[place] for place in places], asked)
        )
        if self.compressor.interface == "text":
            return [escape_placeholders(passage.text or "") for passage in passages]
        issued = [
            Issued(key, passage.slots, passage.reader, functools.partial(self._again, text, asked))
            for key, passage, text in zip(keys, passages, texts)
        ]
        placeholders = self.store.issue(issued) if issued else []
        return [placeholder if passage.slots else "" for placeholder, passage in zip(placeholders, passages)]

    def _key(self, text: str, query: str | None) -> str:
        maker, reader = self.compressor.fingerprint, self.compressor.reader.fingerprint
        return self.store.cache.key(text, compressor=maker, reader=reader, query=query, ratio=self.ratio)

    def _compress(self, texts: list[str], query: str | None) -> list[CompressedPassage]:
        return self.compressor.compress(texts, query=query, ratio=self.ratio)

    def _again(self, text: str, query: str | None) -> CompressedPassage:
        return self._compress([text], query)[0]


def check_reader(reader: object) -> None:
    """Raises ``TypeError`` for what is neither a `Reader` nor a `nutgraf.adapters.openai.ServedReader`."""
    if not all(hasattr(reader, name) for name in ("generate", "stream", "fingerprint")):
        raise TypeError(f"reader must be a nutgraf Reader or ServedReader, got {type(reader).__name__}.")


def count_positions(reader: Any, text: str) -> int:
    """Positions that a text takes in a `Reader` or a ``ServedReader``, special tokens at its start included.

    Placeholders count as the slots of their passages.

    Raises:
        PlaceholderError: if a placeholder is torn or cannot be read any more.
    """
    (plan,) = reader.plan([read_placeholders(text, reader.fingerprint)])
    return len(plan)
