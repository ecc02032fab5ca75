"""Haystack: components that compress retrieved documents and read them.

``retriever -> CompressedContextDocuments -> PromptBuilder -> CompressedContextGenerator``. With a compressor to ``text`` the
documents contain the shorter text, for any generator; else they contain placeholders (see `nutgraf.adapters.placeholders`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

try:
    from haystack import Document, component
except ImportError as error:  # an extra of the package
    raise ImportError("The Haystack adapter needs haystack-ai: pip install 'nutgraf[haystack]'.") from error

from ..compressors import Compressor
from .checks import check_reader
from .placeholders import PlaceholderStore, read_placeholders
from .placeholders.documents import TextsForReading
from .threads import agenerate


@component
class CompressedContextDocuments:
    """Compresses retrieved documents for the LLM; put it before the prompt builder.

    Documents keep their order, id, score and meta; the original text is in ``meta["original_text"]``, or in
    ``meta["nutgraf_original_text"]`` if the document has an entry of its own of that name. Documents without text stay as they
    are. A document that passes twice is compressed from its original text.

    Args:
        compressor: compresses the documents' texts.
        ratio: compression ratio L / l; default: the compressor's own.
        query_aware: pass the question to the compressor; default: the compressor's ``query_aware``.
        placeholders: default: the store that all adapters for the reader share.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: float | None = None,
        query_aware: bool | None = None,
        placeholders: PlaceholderStore | None = None,
    ) -> None:
        self._texts = TextsForReading(compressor, ratio=ratio, query_aware=query_aware, placeholders=placeholders)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document], query: str | None = None) -> dict[str, Any]:
        """Return ``{"documents": ...}``: copies of the documents with compressed contents."""
        given = [document for document in documents if document.content is not None]
        made = iter(self._texts.contents([(str(document.content), document.meta) for document in given], query))
        out = []
        for document in documents:
            if document.content is not None:
                content, meta = next(made)
                document = replace(document, content=content, meta=meta)
            out.append(document)
        return {"documents": out}


@component
class CompressedContextGenerator:
    """A reader as a Haystack generator that reads placeholders as compressed passages.

    Args:
        reader: a `Reader` or a `nutgraf.adapters.openai.ServedReader`.
        max_new_tokens: longest answer in tokens.
        options: passed to the reader's ``generate`` (``stop``, ``chat``, ``do_sample``, ...).
    """

    def __init__(self, reader: Any, max_new_tokens: int = 256, **options: Any) -> None:
        check_reader(reader)
        self._reader = reader
        self._options = {"max_new_tokens": max_new_tokens, **options}

    @component.output_types(replies=list[str])
    def run(self, prompt: str, generation_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``{"replies": [answer]}``; ``generation_kwargs`` override the component's options."""
        read = read_placeholders(prompt, self._reader.fingerprint)
        return {"replies": self._reader.generate([read], **{**self._options, **(generation_kwargs or {})})}

    @component.output_types(replies=list[str])
    async def run_async(self, prompt: str, generation_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """`run` in a worker thread; generation ends when the task is cancelled."""
        read = read_placeholders(prompt, self._reader.fingerprint)
        return {"replies": [await agenerate(self._reader, read, **{**self._options, **(generation_kwargs or {})})]}
