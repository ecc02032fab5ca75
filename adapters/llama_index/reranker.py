"""The postprocessor that reranks retrieved nodes by their compressed passages, without reading their text."""

from __future__ import annotations

from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from ...compressors import Compressor
from ...compressors.reader.ranking import nearest_passages, rank_passages
from ..checks import check_compressor
from ..placeholders import PassageCache
from ..placeholders.placeholder import refuse_placeholders
from ..placeholders.source import PassageSource
from ..store import PassageStore
from .nodes import text_of


class CompressedReranker(BaseNodePostprocessor):
    """Puts the most relevant nodes first; put it before `CompressedContextPostprocessor`.

    With ``by="reader"`` the compressor's reader reads the question and the nodes' compressed passages, and chooses one after
    the other (PE-RANK, arXiv 2406.14848; see `rank_passages`). With ``by="slots"`` the question is compressed too, and nodes
    come in the order of the cosine between mean slots (UniICL, arXiv 2405.17062; see `nearest_passages`). Nodes keep their
    scores, which are the retriever's. Nodes without text, or whose text has no tokens, come last.

    Args:
        compressor: a compressor to soft tokens that was trained with the objective ``rank``, such as PE-RANK, or for
            ``by="slots"`` with ``contrast``, such as UniICL.
        by: what compares, see above.
        top_n: nodes to keep; default: all.
        ratio: compression ratio L / l; default: the compressor's own.
        window, stride: passages ranked in one prompt, and how far apart these prompts are.
        reuse_vectors: pass the nodes' retrieval vectors to a compressor that takes them.
        cache: compressed passages by key; default: one of its own.
        store: a `nutgraf.adapters.store.PassageStore` filled at indexing time.

    Raises:
        TypeError: if ``compressor`` is not a compressor.
        ValueError: if it does not give soft tokens, reads questions, or ``stride`` is above ``window``.

    Example::

        engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[CompressedReranker(compressor, top_n=4)])
    """

    by: Literal["reader", "slots"] = Field(default="reader", description="What compares question and passages.")
    top_n: int | None = Field(default=None, ge=1, description="Nodes to keep.")
    ratio: float | None = Field(default=None, ge=1, description="Compression ratio L / l.")
    window: int = Field(default=20, ge=1, description="Passages ranked in one prompt.")
    stride: int = Field(default=10, ge=1, description="Distance of two prompts, in passages.")
    reuse_vectors: bool = Field(default=False, description="Pass the nodes' retrieval vectors to the compressor.")
    _source: PassageSource = PrivateAttr()

    def __init__(
        self,
        compressor: Compressor,
        *,
        by: Literal["reader", "slots"] = "reader",
        top_n: int | None = None,
        ratio: float | None = None,
        window: int = 20,
        stride: int = 10,
        reuse_vectors: bool = False,
        cache: PassageCache | None = None,
        store: PassageStore | None = None,
        **kwargs: Any,
    ) -> None:
        check_compressor(compressor)
        if compressor.interface != "embeds" or compressor.query_aware:
            what = "reads questions" if compressor.interface == "embeds" else f"gives {compressor.interface}"
            raise ValueError(
                f"CompressedReranker compares stored soft tokens, but this {type(compressor).__name__} {what}; use "
                "a compressor to soft tokens that was trained with the objective rank or contrast."
            )
        if stride > window:
            raise ValueError(f"stride must be at most window, got stride={stride} and window={window}.")
        settings: dict[str, Any] = dict(
            by=by, top_n=top_n, ratio=ratio, window=window, stride=stride, reuse_vectors=reuse_vectors
        )
        super().__init__(**settings, **kwargs)
        self._source = PassageSource(compressor, PassageCache() if cache is None else cache, store)

    @classmethod
    def class_name(cls) -> str:
        return "CompressedReranker"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("CompressedReranker ranks nodes for a question and got none; pass query_bundle=...")
        query = query_bundle.query_str
        refuse_placeholders(query)
        read = [i for i, scored in enumerate(nodes) if (text_of(scored.node) or "").strip()]
        texts = [text_of(nodes[i].node) or "" for i in read]
        vectors = [nodes[i].node.embedding for i in read] if self.reuse_vectors else None
        passages, _ = self._source.get(texts, ratio=self.ratio, vectors=vectors)
        full = [(i, passage) for i, passage in zip(read, passages) if passage.slots]
        compressed = [passage for _, passage in full]
        if self.by == "slots":
            (asked,) = self._source.compressor.compress([query], ratio=self.ratio)
            order = nearest_passages(asked, compressed) if asked.slots else list(range(len(full)))
        else:
            reader = self._source.compressor.reader
            order = rank_passages(reader, query, compressed, window=self.window, stride=self.stride)
        first = [full[i][0] for i in order]
        ranked = [*first, *(i for i in range(len(nodes)) if i not in set(first))]
        return [nodes[i] for i in ranked][: self.top_n]
