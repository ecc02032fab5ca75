"""Compression at indexing time, and retrieval from the same table."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.schema import (
    BaseNode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
    TransformComponent,
)

from ...compressors import Compressor, FidelityGate
from ..checks import check_compressor, with_budget
from ..store import Maker, PassageStore, documents, fill
from ..threads import in_thread
from .nodes import text_of

if TYPE_CHECKING:
    from ..store import LanceStore

_dispatcher = get_dispatcher(__name__)
_ABOUT = ("node_id", "ref_doc_id", "metadata", "excluded_llm_metadata_keys", "excluded_embed_metadata_keys")


class PassagesStoredEvent(BaseEvent):
    """Nodes were compressed into a store; the counts are those of `nutgraf.adapters.store.Filled`."""

    found: int
    compressed: int
    source_tokens: int
    slots: int
    updated: int
    ms: float

    @classmethod
    def class_name(cls) -> str:
        return "PassagesStoredEvent"


class CompressPassages(TransformComponent):
    """Compresses nodes into a store during ingestion and returns them unchanged.

    Put it after the splitter, and after the embedding if the store is to hold retrieval vectors too. A
    `CompressedContextPostprocessor` with the same ``store`` finds the passages by the nodes' texts. Stored passages are not
    compressed again: their embedding, id, metadata and source document become the node's. Every batch is saved when it is
    done, so a stopped ingestion continues where it was. Nodes without text and images are skipped.

    Args:
        compressor: compresses the nodes' texts; must not be query-aware.
        store: where the compressed passages go.
        ratio: compression ratio L / l; default: the compressor's own. Give the postprocessor the same.
        max_tokens: the most reader tokens of each shorter text, instead of a ratio. Give the postprocessor the same.
        batch_size: nodes compressed and stored at a time.
        reuse_vectors: pass the nodes' embeddings to a compressor that takes them (xRAG); they must come from its own
            embedder and from the text alone.
        gate: a `FidelityGate` of the compressor; its signals are stored for a postprocessor with ``fidelity=``. It need not
            be calibrated yet.

    Raises:
        TypeError: if ``compressor``, ``store`` or ``gate`` has the wrong type.
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
    max_tokens: int | None = Field(default=None, ge=1, description="The most reader tokens of each shorter text.")
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
        max_tokens: int | None = None,
        batch_size: int = 64,
        reuse_vectors: bool = False,
        gate: FidelityGate | None = None,
        **kwargs: Any,
    ) -> None:
        check_compressor(compressor)
        if not isinstance(store, PassageStore):
            raise TypeError(
                f"store must be a PassageStore, such as LanceStore('passages'), got {type(store).__name__}."
            )
        if gate is not None and not isinstance(gate, FidelityGate):
            raise TypeError(f"gate must be a FidelityGate, got {type(gate).__name__}.")
        if compressor.query_aware:
            raise ValueError(
                f"{type(compressor).__name__} compresses for a question, which is unknown when a passage is indexed; make it "
                "without query awareness, or leave it to the postprocessor."
            )
        settings: dict[str, Any] = {"ratio": ratio, "max_tokens": max_tokens, "batch_size": batch_size}
        super().__init__(reuse_vectors=reuse_vectors, **settings, **kwargs)  # type: ignore[call-arg]
        self._compressor = with_budget(compressor, ratio, max_tokens)
        self._store = store
        self._gate = gate

    @classmethod
    def class_name(cls) -> str:
        return "CompressPassages"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the settings, fingerprints and the store's name, by which a pipeline's cache tells transformations apart."""
        return super().to_dict(**kwargs) | {
            "compressor": self._compressor.fingerprint,
            "reader": self._compressor.reader.fingerprint,
            "store": self._store.name,
            "gate": None if self._gate is None else self._gate.measure_id,
        }

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress what is not stored yet and return the nodes unchanged."""
        return self._run(nodes, threading.Event())

    def _run(self, nodes: Sequence[BaseNode], stopped: threading.Event) -> Sequence[BaseNode]:
        def after_batch(number: int) -> None:
            if stopped.is_set():
                raise asyncio.CancelledError

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
                done=after_batch,
            )
        _dispatcher.event(PassagesStoredEvent(**asdict(filled), ms=(time.perf_counter() - start) * 1e3))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress in a worker thread; ends after the current batch when the task is cancelled."""
        return await in_thread(lambda stopped: self._run(nodes, stopped))

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "CompressPassages holds a model and cannot go to another process: run the pipeline with num_workers=None "
            "(the compressor works in batches of its own), or `nutgraf compress --engine ray` for many processes."
        )


class StoreRetriever(BaseRetriever):
    """Retrieves from a `LanceStore` with retrieval vectors: one table serves retrieval and reading.

    The score of a node is the cosine similarity. A text is stored once; if several documents hold it, there is a node of each.

    Args:
        store: filled by `CompressPassages` after an embedding.
        embed_model: embeds the question; the model that embedded the nodes.
        compressor: return only its passages; needed if the store holds passages of several compressors.
        similarity_top_k: number of passages.
        ratio: the ratio given to `CompressPassages`.

    Raises:
        TypeError: if ``store`` is not a `LanceStore`.
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
        self._maker = None if compressor is None else Maker.of(compressor, ratio)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = query_bundle.embedding or self._embed_model.get_agg_embedding_from_queries(query_bundle.embedding_strs)
        hits = self._store.search(vector, self._top_k, self._maker, metric="cosine")
        found = [(hit, about) for hit in hits for about in documents(hit.entry.about) or [{}]]
        return [
            NodeWithScore(node=_node(hit.entry.text or "", about), score=1.0 - hit.distance)
            for hit, about in found[: self._top_k]
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _about(node: BaseNode) -> dict[str, Any]:
    """Node facts stored besides text and vector; values that JSON cannot hold, such as dates, become text."""
    found = {name: getattr(node, name) for name in _ABOUT}
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _node(text: str, about: dict[str, Any]) -> TextNode:
    fields = {name: about[name] for name in _ABOUT if name in about}
    if "node_id" in fields:
        fields["id_"] = fields.pop("node_id")
    if document := fields.pop("ref_doc_id", None):
        fields["relationships"] = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)}
    return TextNode(text=text, **fields)
