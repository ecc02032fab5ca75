"""Compression at indexing time, and retrieval from the same table that holds the slots."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, TextNode, TransformComponent

from ...compressors import Compressor, FidelityGate
from ..store import Maker, PassageStore, fill
from .nodes import text_of

if TYPE_CHECKING:
    from ..store import LanceStore

_dispatcher = get_dispatcher(__name__)
_ABOUT = ("node_id", "metadata", "excluded_llm_metadata_keys", "excluded_embed_metadata_keys")


class PassagesStoredEvent(BaseEvent):
    """Nodes were compressed into a store.

    Attributes:
        found: distinct passages that were stored before.
        compressed: those compressed now.
        source_tokens: reader tokens of the texts compressed now.
        slots: reader positions that these take.
        ms: milliseconds it took.
    """

    found: int
    compressed: int
    source_tokens: int
    slots: int
    ms: float

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex logs the event."""
        return "PassagesStoredEvent"


class CompressPassages(TransformComponent):
    """Compresses nodes as they are ingested, and puts the compressed passages into a store.

    It goes after the splitter, and after the embedding where the store is to hold retrieval vectors too. The nodes are
    handed on as they are: what a `CompressedContextPostprocessor` with the same ``store`` finds at query time, it finds by
    the node's text. Passages that are stored already are skipped, and every batch is safe once it is done, so that an
    ingestion that was stopped goes on where it was. Nodes without text and images are passed over.

    Args:
        compressor: compresses the nodes' texts, without a question: query-aware compressors have nothing to do here.
        store: where the compressed passages go.
        ratio: compression ratio L / l in place of the compressor's own; give the postprocessor the same.
        batch_size: nodes compressed and stored at a time.
        reuse_vectors: give the nodes' embeddings to a compressor that takes them (xRAG); they must be those of its own
            embedder, of the text alone.
        gate: a `FidelityGate` of the compressor, whose signals are stored with the passages, for a postprocessor with
            ``fidelity=``. It need not be calibrated yet.

    Raises:
        TypeError: if ``compressor``, ``store`` or ``gate`` is none.
        ValueError: if a number is out of range, or the compressor needs the question.

    Example::

        store = LanceStore("passages")
        IngestionPipeline(transformations=[SentenceSplitter(), embedder, CompressPassages(compressor, store)]).run(...)
        engine = index.as_query_engine(
            llm=CompressedContextLLM(reader),
            node_postprocessors=[CompressedContextPostprocessor(compressor, store=store)],
        )
    """

    ratio: float | None = Field(default=None, ge=1, description="Compression ratio L / l.")
    batch_size: int = Field(default=64, ge=1, description="Nodes compressed and stored at a time.")
    reuse_vectors: bool = Field(default=False, description="Pass the nodes' embeddings to the compressor.")
    _compressor: Compressor = PrivateAttr()
    _store: PassageStore = PrivateAttr()
    _gate: FidelityGate | None = PrivateAttr()
    _running: Any = PrivateAttr(default_factory=threading.Lock)  # one ingestion at a time compresses nothing twice

    def __init__(
        self,
        compressor: Compressor,
        store: PassageStore,
        *,
        ratio: float | None = None,
        batch_size: int = 64,
        reuse_vectors: bool = False,
        gate: FidelityGate | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(compressor, "compress") or not hasattr(compressor, "fingerprint"):
            raise TypeError(f"compressor must be a nutgraf compressor, got {type(compressor).__name__}.")
        if not isinstance(store, PassageStore):
            raise TypeError(
                f"store must be a PassageStore, such as LanceStore('passages'), got {type(store).__name__}."
            )
        if gate is not None and not isinstance(gate, FidelityGate):
            raise TypeError(f"gate must be a FidelityGate, got {type(gate).__name__}.")
        if compressor.query_aware:
            raise ValueError(
                f"{type(compressor).__name__} compresses for a question, which nobody knows when a passage is indexed; "
                "make it without query awareness, or leave it to the postprocessor."
            )
        super().__init__(ratio=ratio, batch_size=batch_size, reuse_vectors=reuse_vectors, **kwargs)  # type: ignore[call-arg]
        self._compressor = compressor
        self._store = store
        self._gate = gate

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises and traces the transformation."""
        return "CompressPassages"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Settings, with the fingerprints and the store's name: a pipeline's cache tells transformations apart by them."""
        return super().to_dict(**kwargs) | {
            "compressor": self._compressor.fingerprint,
            "reader": None if self._compressor.reader is None else self._compressor.reader.fingerprint,
            "store": self._store.name,
            "gate": None if self._gate is None else self._gate.measure_id,
        }

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compresses what is not stored yet; the nodes themselves are returned, unchanged."""
        start = time.perf_counter()
        found = [(node, text) for node in nodes if (text := text_of(node)) is not None]
        with self._running:
            filled = fill(
                self._store,
                self._compressor,
                [text for _, text in found],
                ratio=self.ratio,
                vectors=[node.embedding for node, _ in found],
                reuse_vectors=self.reuse_vectors,
                abouts=[_about(node) for node, _ in found],
                gate=self._gate,
                batch_size=self.batch_size,
            )
        ms = (time.perf_counter() - start) * 1e3
        _dispatcher.event(
            PassagesStoredEvent(
                found=filled.found,
                compressed=filled.compressed,
                source_tokens=filled.source_tokens,
                slots=filled.slots,
                ms=ms,
            )
        )
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same in a worker thread, so that the event loop goes on."""
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "CompressPassages holds a model and cannot go to another process: run the pipeline with num_workers=None "
            "(the compressor works in batches of its own), or `nutgraf compress --engine ray` for many processes."
        )


class StoreRetriever(BaseRetriever):
    """Retrieves from a `LanceStore` that holds retrieval vectors, so that one table serves retrieval and reading.

    Args:
        store: filled by `CompressPassages` after an embedding.
        embed_model: embeds the question; the one that embedded the nodes.
        compressor: only the passages that it made; needed where the store holds those of several.
        similarity_top_k: how many passages.
        ratio: the ratio given to `CompressPassages`.

    The score of a node is the cosine similarity. Of nodes with the same text the store holds one.

    Raises:
        TypeError: if ``store`` is no `LanceStore`.
    """

    def __init__(
        self,
        store: LanceStore,
        embed_model: BaseEmbedding,
        compressor: Compressor | None = None,
        *,
        similarity_top_k: int = 2,
        ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(store, "search"):
            raise TypeError(f"store must be a LanceStore, which holds retrieval vectors, got {type(store).__name__}.")
        super().__init__(**kwargs)
        self._store = store
        self._embed_model = embed_model
        self._top_k = similarity_top_k
        self._maker = None
        if compressor is not None:
            reader = None if compressor.reader is None else compressor.reader.fingerprint
            self._maker = Maker(compressor.fingerprint, reader, ratio)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding or self._embed_model.get_agg_embedding_from_queries(query_bundle.embedding_strs)
        hits = self._store.search(vector, self._top_k, self._maker, metric="cosine")
        return [
            NodeWithScore(node=_node(hit.entry.text or "", hit.entry.about or {}), score=1.0 - hit.distance)
            for hit in hits
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _about(node: BaseNode) -> dict[str, Any]:
    """What a store keeps of a node beside text and vector; what JSON cannot hold, such as dates, as text."""
    found = {name: getattr(node, name) for name in _ABOUT}
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _node(text: str, about: dict[str, Any]) -> TextNode:
    fields = {name: about[name] for name in _ABOUT if name in about}
    if "node_id" in fields:
        fields["id_"] = fields.pop("node_id")
    return TextNode(text=text, **fields)
