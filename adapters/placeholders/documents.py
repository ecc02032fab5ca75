"""Retrieved texts as strings for an LLM, for frameworks whose documents are plain strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...compressors import Compressor
from ..checks import check_compressor, with_budget
from .originals import keep_original, original_of
from .placeholder import PlaceholderStore, read_placeholders, refuse_placeholders, shared_store
from .source import PassageSource


class TextsForReading:
    """Compresses retrieved texts and gives the strings that the LLM reads. Thread-safe.

    Args:
        compressor: compresses the texts.
        ratio: compression ratio L / l; default: the compressor's own.
        max_tokens: the most reader tokens of each shorter text, instead of a ratio.
        query_aware: pass the question to the compressor; default: the compressor's ``query_aware``.
        placeholders: default: the store that all adapters for the compressor's reader share.

    Raises:
        TypeError: if ``compressor`` is not a compressor.
        ValueError: if ``ratio`` is below 1, or ``max_tokens`` does not fit.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: float | None = None,
        max_tokens: int | None = None,
        query_aware: bool | None = None,
        placeholders: PlaceholderStore | None = None,
    ) -> None:
        check_compressor(compressor)
        if ratio is not None and not ratio >= 1:
            raise ValueError(f"ratio is source tokens per slot, at least 1, got {ratio!r}.")
        compressor = with_budget(compressor, ratio, max_tokens)
        self.ratio = ratio
        self.query_aware = compressor.query_aware if query_aware is None else query_aware
        self.placeholders = placeholders or shared_store(compressor.reader)
        self._source = PassageSource(compressor, self.placeholders.cache)

    def contents(
        self, documents: Sequence[tuple[str, Mapping[str, Any]]], query: str | None
    ) -> list[tuple[str, dict[str, Any]]]:
        """Return new content and metadata per document, given as content and metadata.

        The content is a placeholder, the shorter text of a text compressor, or "" for no slots. The metadata have the original
        text. A document compressed before is compressed anew from its original text.

        Raises:
            PlaceholderError: if a document was compressed before, and its metadata lack the original text.
            ValueError: if the question contains a placeholder.
        """
        refuse_placeholders(query)
        texts = [original_of(content, metadata) for content, metadata in documents]
        passages, _ = self._source.get(texts, query=query if self.query_aware else None, ratio=self.ratio)
        return [
            (content, keep_original(metadata, content, text))
            for content, text, (_, metadata) in zip(self.placeholders.issue(passages), texts, documents)
        ]


def count_positions(reader: Any, text: str) -> int:
    """Count the positions a prompt takes in a `Reader` or ``ServedReader``, initial special tokens included.

    A placeholder counts as the slots of its passage.

    Raises:
        PlaceholderError: if a placeholder is torn or expired.
    """
    read = read_placeholders(text, reader.fingerprint)
    return len(reader.plan([read])[0]) if read else 0  # an empty prompt cannot be laid out
