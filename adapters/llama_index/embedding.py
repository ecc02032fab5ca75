"""Sentence-transformers model as a LlamaIndex embedding."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from ...compressors.encoders.embedder import Embedder, load_embedder


class SentenceTransformerEmbedding(BaseEmbedding):
    """Embeds texts and queries with a sentence-transformers model; needs the extra ``embedders``.

    Vectors are cached; embedding is thread-safe; async methods use a worker thread. sentence-transformers cuts texts that are
    longer than the model reads: keep the index's chunks short enough.

    Args:
        model: a ``SentenceTransformer``, its name or folder, or the ``embedder`` of an xRAG compressor (which then reads the
            index's vectors with ``reuse_vectors=True``).
        device: device of a model given by name.
        kwargs: passed to LlamaIndex's ``BaseEmbedding`` (``embed_batch_size``, ``callback_manager``, ...).
    """

    _embedder: Embedder = PrivateAttr()

    def __init__(self, model: Any = "all-MiniLM-L6-v2", *, device: str | None = None, **kwargs: Any) -> None:
        embedder = load_embedder(str(model) if isinstance(model, Path) else model, device)
        super().__init__(model_name=embedder.name, **kwargs)
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        return "SentenceTransformerEmbedding"

    @property
    def embedder(self) -> Embedder:
        """The model, for ``load_compressor(path, reader, embedder=...)`` of xRAG."""
        return self._embedder

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.embed(texts).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embeddings([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
