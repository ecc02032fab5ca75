"""xRAG: projects a passage's retrieval vector into the reader's embedding space, as one slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.passage import Interface
from ..registry import register_compressor
from ..slots.vectors import VectorCompressor, VectorSettings


@dataclass
class XRAGConfig(VectorSettings):
    """Settings of xRAG."""

    method: ClassVar[str] = "xrag"
    title: ClassVar[str] = "xRAG"
    cost: ClassVar[str] = "vector"
    retired: ClassVar[Mapping[str, Any]] = {"normalize": True, "scale": "matched", "pooling": "own"}


@register_compressor
class XRAGCompressor(VectorCompressor):
    """One slot per passage: ``slot = scale * MLP(embedder(passage))`` (xRAG, arXiv 2405.13792). See `VectorCompressor`.

    Beyond the paper: no shard is dropped (the release drops a last shard of up to 20 tokens), the output starts on the scale of
    the reader's embeddings, and ``ratio`` makes shards shorter.
    """

    config_class: ClassVar[type[XRAGConfig]] = XRAGConfig
    interface: ClassVar[Interface] = "embeds"
    config: XRAGConfig
