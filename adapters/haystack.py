"""Haystack: components that compress retrieved documents and read them.

``retriever -> CompressedContextDocuments -> PromptBuilder -> CompressedContextGenerator``. With a compressor to ``text`` the
documents contain the shorter text, for any generator; else they contain placeholders (see `nutgraf.adapters.placeholders`).
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any, TypeVar

try:
    from haystack import DeserializationError, Document, component, default_from_dict, default_to_dict
except ImportError as error:  # an extra of the package
    raise ImportError("The Haystack adapter needs haystack-ai: pip install 'nutgraf[haystack]'.") from error

from ..compressors import Compressor
from .checks import check_reader
from .placeholders import PlaceholderStore, read_placeholders
from .placeholders.documents import TextsForReading
from .threads import agenerate

ComponentT = TypeVar("ComponentT")
_MODELS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(*models: Any) -> None:
    """Let ``Pipeline.loads`` find compressors and readers, which a saved pipeline names by fingerprint.

    The models of components made in this process are known already. Newer versions of Haystack also want the module to be
    allowed: ``Pipeline.loads(saved, allowed_modules=["nutgraf.adapters.haystack"])``.
    """
    for model in models:
        _MODELS[_name(model)] = model


def _name(model: Any) -> str:
    if hasattr(model, "compress"):
        return f"compressor {model.fingerprint} for reader {model.reader.fingerprint}"
    return f"reader {model.fingerprint}"


def _load(cls: type[ComponentT], data: dict[str, Any], role: str) -> ComponentT:
    name = data["init_parameters"][role]
    model = _MODELS.get(name)
    if model is None:
        raise DeserializationError(
            f"The pipeline needs the {name}, which is not loaded here; load it and call nutgraf.adapters.haystack.register(it)."
        )
    return default_from_dict(cls, {**data, "init_parameters": {**data["init_parameters"], role: model}})


@component
class CompressedContextDocuments:
    """Compresses retrieved documents for the LLM; put it before the prompt builder.

    Documents keep their order, id, score and meta; the original text is in ``meta["original_text"]``, or in
    ``meta["nutgraf_original_text"]`` if the document has an entry of its own of that name. Documents without text stay as they
    are. A document that passes twice is compressed from its original text.

    Args:
        compressor: compresses the documents' texts.
        ratio: compression ratio L / l; default: the compressor's own.
        max_tokens: the most reader tokens of each shorter text, instead of a ratio (compressors to text).
        query_aware: pass the question to the compressor; default: the compressor's ``query_aware``.
        placeholders: default: the store that all adapters for the reader share.
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
        self._settings: dict[str, Any] = {"ratio": ratio, "max_tokens": max_tokens, "query_aware": query_aware}
        self._compressor = compressor
        self._texts = TextsForReading(compressor, **self._settings, placeholders=placeholders)

        register(compressor)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings; the compressor by fingerprint, see `register`. Placeholders become the shared ones."""
        return default_to_dict(self, compressor=_name(self._compressor), **self._settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressedContextDocuments:
        """Make a component from `to_dict`. Raises ``DeserializationError`` if the compressor is not loaded."""
        return _load(cls, data, "compressor")

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
        register(reader)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings; the reader by fingerprint, see `register`."""
        return default_to_dict(self, reader=_name(self._reader), **self._options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressedContextGenerator:
        """Make a component from `to_dict`. Raises ``DeserializationError`` if the reader is not loaded."""
        return _load(cls, data, "reader")

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
