"""The postprocessor that replaces what the LLM reads of retrieved nodes by compressed passages."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

from ...compressors import CompressedPassage, Compressor
from ..passage_cache import PassageCache
from ..placeholders import Issued, PlaceholderStore, ReadingLLM, escape_placeholders, holds_placeholder, shared_store
from ..store import PassageStore, explain_missing, get_or_compress, keys_for
from .events import CompressionEvent
from .nodes import read_as, text_of

_dispatcher = get_dispatcher(__name__)
_log = logging.getLogger(__name__)


class CompressedContextPostprocessor(BaseNodePostprocessor):
    """Compresses retrieved nodes for the LLM; put it last.

    With a compressor to ``embeds`` or ``kv`` the LLM must be a `CompressedContextLLM` with the compressor's reader: each
    node then carries a placeholder for its slots. With a compressor to ``text`` the LLM may be any: each node then carries
    the shorter text. Either way ids, scores, metadata and relationships are the retrieved nodes', and their text is what
    everybody but the LLM sees (``response.source_nodes``, evaluators, the document store). The nodes passed in are never
    changed. What was compressed once is kept; ``apostprocess_nodes`` compresses in a worker thread.

    Args:
        compressor: compresses the nodes' texts.
        ratio: compression ratio L / l in place of the compressor's own.
        top_text: so many nodes at the head of the list are left as text.
        keep_metadata: put the metadata that LlamaIndex would show the LLM as text in front of the compressed passage;
            otherwise the LLM does not see it.
        query_aware: pass the question to the compressor and keep one result a question; default: what the compressor's
            ``query_aware`` says, or no.
        reuse_vectors: pass the nodes' own retrieval vectors to a compressor that takes them (xRAG). They must come from
            the embedder that it was trained with, of the same text: exclude metadata from what the index embeds, and keep
            chunks as short as the embedder reads. Few vector stores return vectors with the nodes (LlamaIndex's default
            one does not); nodes without one are embedded again.
        as_text: insist on text for the LLM, that is, on a compressor to ``text``.
        cache: where compressed passages are kept, or a whole `PlaceholderStore`; default: one that all adapters for the
            reader share.
        store: a `nutgraf.adapters.store.PassageStore` in which passages were put when they were indexed: what is there is
            read and not compressed. What is not there is compressed now and, unless the store is read-only, put there.
        batch_size: passages compressed at a time.

    Raises:
        TypeError: if ``compressor`` is none.
        ValueError: if ``as_text`` is asked of a compressor that gives no text, or a number is out of range.

    Example::

        engine = index.as_query_engine(
            llm=CompressedContextLLM(reader), node_postprocessors=[CompressedContextPostprocessor(compressor)]
        )
    """

    ratio: float | None = Field(default=None, ge=1, description="Compression ratio L / l.")
    top_text: int = Field(default=0, ge=0, description="Nodes at the head of the list that stay text.")
    keep_metadata: bool = Field(default=False, description="Show the LLM the nodes' metadata as text.")
    query_aware: bool = Field(default=False, description="Pass the question to the compressor.")
    reuse_vectors: bool = Field(default=False, description="Pass the nodes' retrieval vectors to the compressor.")
    batch_size: int | None = Field(default=None, ge=1, description="Passages compressed at a time.")
    _compressor: Compressor = PrivateAttr()
    _reader: str | None = PrivateAttr()  # fingerprint
    _store: PlaceholderStore = PrivateAttr()
    _indexed: PassageStore | None = PrivateAttr(default=None)
    _warned: bool = PrivateAttr(default=False)

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: float | None = None,
        top_text: int = 0,
        keep_metadata: bool = False,
        query_aware: bool | None = None,
        reuse_vectors: bool = False,
        as_text: bool = False,
        cache: PassageCache | PlaceholderStore | None = None,
        store: PassageStore | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(compressor, "compress") or not hasattr(compressor, "interface"):
            raise TypeError(f"compressor must be a nutgraf compressor, got {type(compressor).__name__}.")
        if as_text and compressor.interface != "text":
            raise ValueError(
                f"as_text=True needs a compressor to text, but {type(compressor).__name__} gives {compressor.interface}; "
                "use a text compressor, or leave the postprocessor out to give the LLM the full text."
            )
        if query_aware is None:
            query_aware = bool(getattr(compressor, "query_aware", False))
        settings: dict[str, Any] = {
            "ratio": ratio,
            "top_text": top_text,
            "keep_metadata": keep_metadata,
            "query_aware": query_aware,
            "reuse_vectors": reuse_vectors,
            "batch_size": batch_size,
        }
        super().__init__(**settings, **kwargs)
        self._compressor = compressor
        self._reader = None if compressor.reader is None else compressor.reader.fingerprint
        self._indexed = store
        if isinstance(cache, PlaceholderStore):
            self._store = cache
        elif cache is None and self._reader is not None:
            self._store = shared_store(self._reader)
        else:
            self._store = PlaceholderStore(cache)

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises and traces the postprocessor."""
        return "CompressedContextPostprocessor"

    @property
    def cache(self) -> PassageCache:
        """Where compressed passages are kept."""
        return self._store.cache

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = None if query_bundle is None else query_bundle.query_str
        if query is not None and holds_placeholder(query):
            raise ValueError(
                "The question holds a placeholder of a compressed passage, which only a copy from a prompt or a log can "
                "bring there; remove it, or run escape_placeholders over the question."
            )
        texts = {i: text for i, n in enumerate(nodes) if i >= self.top_text and (text := text_of(n.node)) is not None}
        contents = iter(self._compress([nodes[i].node for i in texts], list(texts.values()), query))
        out = []
        for i, scored in enumerate(nodes):
            node = self._compressed(scored.node, next(contents)) if i in texts else self._escaped(scored.node)
            out.append(NodeWithScore.model_construct(node=node, score=scored.score))
        return out

    # -- compressing -----------------------------------------------------------------------------------------------

    def _compress(self, nodes: Sequence[BaseNode], texts: Sequence[str], query: str | None) -> list[str]:
        """What the LLM is to read for each node, metadata aside: a placeholder or a shorter text."""
        if not nodes:
            return []
        start = time.perf_counter()
        compressor, query = self._compressor, query if self.query_aware else None
        vectors = [self._vector(node) for node in nodes]
        if compressor.interface != "text":
            self._check_llm()
        key = functools.partial(
            self.cache.key, compressor=compressor.fingerprint, reader=self._reader, query=query, ratio=self.ratio
        )
        keys = [key(text, vector=vector) for text, vector in zip(texts, vectors)]
        missed: list[int] = []

        def compress(places: Sequence[int]) -> list[CompressedPassage]:
            made, compressed = self._look_up_or_run([texts[i] for i in places], query, [vectors[i] for i in places])
            missed.extend(places[i] for i in compressed)
            return made

        passages = self.cache.get_or_compress(keys, compress)
        event = CompressionEvent(
            passages=len(passages),
            compressed=len(missed),
            source_tokens=sum(p.source_tokens for p in passages),
            slots=sum(p.slots for p in passages),
            ms=(time.perf_counter() - start) * 1e3,
        )
        _dispatcher.event(event)
        if compressor.interface == "text":
            return [escape_placeholders(passage.text or "") for passage in passages]
        self._check_window(nodes, passages)
        again = [functools.partial(self._again, text, query, vector) for text, vector in zip(texts, vectors)]
        placeholders = self._store.issue(
            [Issued(key, passage.slots, passage.reader, f) for key, passage, f in zip(keys, passages, again)]
        )
        return [placeholder if passage.slots else "" for placeholder, passage in zip(placeholders, passages)]

    def _look_up_or_run(
        self, texts: Sequence[str], query: str | None, vectors: Sequence[list[float] | None]
    ) -> tuple[list[CompressedPassage], list[int]]:
        """The passages, from the store where it has them, and the places of those that were compressed."""
        if self._indexed is None:
            return self._run(texts, query, vectors), list(range(len(texts)))
        keys = keys_for(self._compressor, texts, ratio=self.ratio, query=query)
        passages, compressed = get_or_compress(
            self._indexed,
            keys,
            texts,
            lambda places: self._run([texts[i] for i in places], query, [vectors[i] for i in places]),
        )
        if compressed and not self._warned:
            self._warned = True  # once, not at each request
            _log.warning(
                "%d of %d passages were not in the store %s and were compressed at query time%s",
                len(compressed),
                len(texts),
                self._indexed.name,
                explain_missing(self._indexed, keys[compressed[0]].maker),
            )
        return passages, compressed

    def _run(
        self, texts: Sequence[str], query: str | None, vectors: Sequence[list[float] | None]
    ) -> list[CompressedPassage]:
        given = list(vectors) if any(vector is not None for vector in vectors) else None
        return self._compressor.compress(
            texts, query=query, ratio=self.ratio, vectors=given, batch_size=self.batch_size
        )

    def _again(self, text: str, query: str | None, vector: list[float] | None) -> CompressedPassage:
        return self._look_up_or_run([text], query, [vector])[0][0]

    def _vector(self, node: BaseNode) -> list[float] | None:
        return node.embedding if self.reuse_vectors else None

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_llm(self) -> None:
        if not ReadingLLM.of(self._reader):
            raise ValueError(
                "No CompressedContextLLM reads with the compressor's reader, so that nothing could read the compressed "
                "passages; pass llm=CompressedContextLLM(reader) to the query engine, or use a compressor to text."
            )

    def _check_window(self, nodes: Sequence[BaseNode], passages: Sequence[CompressedPassage]) -> None:
        rooms = [llm.window - llm.num_output if llm.window else float("inf") for llm in ReadingLLM.of(self._reader)]
        room = max(rooms, default=float("inf"))
        for node, passage in zip(nodes, passages):
            if passage.slots > room:
                raise ValueError(
                    f"Node {node.node_id} takes {passage.slots} slots, but a prompt has {room} positions beside the "
                    "answer; use smaller chunks, a higher compression ratio or a smaller max_new_tokens."
                )

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _compressed(self, node: BaseNode, content: str) -> BaseNode:
        metadata = escape_placeholders(node.get_metadata_str(MetadataMode.LLM).strip()) if self.keep_metadata else ""
        if metadata and content:
            content = node.text_template.format(content=content, metadata_str=metadata).strip()  # type: ignore[attr-defined]
        return read_as(node, content, self._store)

    @staticmethod
    def _escaped(node: BaseNode) -> BaseNode:
        """The node as it is, or a copy that is harmless where its text looks like a placeholder."""
        content = node.get_content(MetadataMode.LLM)
        harmless = escape_placeholders(content)
        return node if content == harmless or text_of(node) is None else read_as(node, harmless)
