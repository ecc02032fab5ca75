"""The postprocessor that gives the LLM compressed passages instead of retrieved nodes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

from ...compressors import CompressedPassage, Compressor, FidelityGate
from ..checks import check_compressor, with_budget
from ..placeholders import PassageCache, PlaceholderStore, escape_placeholders, shared_store
from ..placeholders.placeholder import ReadingLLM, is_placeholder, refuse_placeholders
from ..placeholders.source import PassageSource
from ..store import PassageStore
from .events import CompressionEvent
from .nodes import read_as, text_of
from .policy import TEXT, Form, Policy, TextBelowFidelity, as_policy, compressed_by_ratio, policy_to_dict
from .retrieved import RetrievedPassages

_dispatcher = get_dispatcher(__name__)
_log = logging.getLogger(__name__)


class CompressedContextPostprocessor(BaseNodePostprocessor):
    """Compresses retrieved nodes for the LLM; put it last.

    With a compressor to ``embeds`` or ``kv``, each node carries a placeholder, and the LLM must be a `CompressedContextLLM`
    with the compressor's reader. With a compressor to ``text``, each node carries the shorter text for any LLM. Ids, scores,
    metadata and relationships stay, and everything but the LLM (``response.source_nodes``, evaluators, the document store)
    sees the original text. The input nodes are not changed. ``apostprocess_nodes`` compresses in a worker thread.

    Args:
        compressor: compresses the nodes' texts.
        ratio: compression ratio L / l; default: the compressor's own.
        max_tokens: the most reader tokens of each shorter text, instead of a ratio (compressors to text).
        policy: which nodes stay text, which are compressed, and by what ratio: `TextForTop`, `TextAbove`, `TokenBudget`,
            `AutoBudget`, `ScoreBudget` or your own `Policy`; default: all compressed.
        fidelity: read a passage as text if too little of it survives: ``"low"``, ``"medium"``, ``"high"`` or the least
            probability, in (0, 1), that the answer from the slots is as good as the one from the text
            (`FidelityGate.threshold`). Needs ``gate``; applies to what ``policy`` would compress.
        gate: a calibrated `FidelityGate` of the compressor. Its signals are kept with the passages: give it to
            `CompressPassages` too, to measure at indexing time.
        keep_metadata: show the LLM the nodes' metadata as text before each compressed passage.
        query_aware: pass the question to the compressor; default: the compressor's ``query_aware``.
        reuse_vectors: pass the nodes' retrieval vectors to a compressor that takes them (xRAG). They must come from the
            embedder it was trained with and from the text alone: exclude metadata from what the index embeds, and keep chunks
            as short as the embedder reads. Nodes without a vector are embedded again (LlamaIndex's default vector store
            returns none).
        as_text: require a compressor to text.
        cache: compressed passages by key; default: the one that all adapters for the reader share.
        placeholders: default: the store that all adapters for the reader share.
        store: a `nutgraf.adapters.store.PassageStore` filled at indexing time. Passages found there are not compressed
            again; others are compressed now and added unless the store is read-only.
        batch_size: passages compressed at a time.
        fallback: read a passage as text, instead of raising, if it cannot be compressed or takes more slots than a prompt has
            room for; the log and the `CompressionEvent` say so.

    Raises:
        TypeError: if ``compressor``, ``policy`` or ``gate`` has the wrong type.
        ValueError: if ``as_text`` is set for a compressor that does not give text, a number is out of range, the gate is not
            calibrated or belongs to another compressor, or fidelity is combined with a query-aware compressor or a budget.

    Example::

        engine = index.as_query_engine(
            llm=CompressedContextLLM(reader), node_postprocessors=[CompressedContextPostprocessor(compressor)]
        )
    """

    ratio: float | None = Field(default=None, ge=1, description="Compression ratio L / l.")
    max_tokens: int | None = Field(default=None, ge=1, description="The most reader tokens of each shorter text.")
    policy: dict[str, Any] = Field(description="Which nodes stay text, by name and settings.")
    fidelity: str | float | None = Field(default=None, description="What a passage must have kept to be compressed.")
    keep_metadata: bool = Field(default=False, description="Show the LLM the nodes' metadata as text.")
    query_aware: bool = Field(default=False, description="Pass the question to the compressor.")
    reuse_vectors: bool = Field(default=False, description="Pass the nodes' retrieval vectors to the compressor.")
    batch_size: int | None = Field(default=None, ge=1, description="Passages compressed at a time.")
    fallback: bool = Field(default=False, description="Text for passages that cannot be compressed.")
    _compressor: Compressor = PrivateAttr()
    _policy: Policy = PrivateAttr()
    _placeholders: PlaceholderStore = PrivateAttr()
    _source: PassageSource = PrivateAttr()

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: float | None = None,
        max_tokens: int | None = None,
        policy: Policy | Mapping[str, Any] | None = None,
        fidelity: str | float | None = None,
        gate: FidelityGate | None = None,
        keep_metadata: bool = False,
        query_aware: bool | None = None,
        reuse_vectors: bool = False,
        as_text: bool = False,
        cache: PassageCache | None = None,
        placeholders: PlaceholderStore | None = None,
        store: PassageStore | None = None,
        batch_size: int | None = None,
        fallback: bool = False,
        **kwargs: Any,
    ) -> None:
        check_compressor(compressor)
        if as_text and compressor.interface != "text":
            raise ValueError(
                f"as_text=True needs a compressor to text, but {type(compressor).__name__} gives {compressor.interface}; "
                "use a text compressor, or leave the postprocessor out to give the LLM the full text."
            )
        compressor = with_budget(compressor, ratio, max_tokens)
        if query_aware is None:
            query_aware = compressor.query_aware
        chosen = as_policy(policy)
        settings: dict[str, Any] = dict(
            ratio=ratio,
            max_tokens=max_tokens,
            policy=policy_to_dict(chosen),
            fidelity=fidelity,
            keep_metadata=keep_metadata,
            query_aware=query_aware,
            reuse_vectors=reuse_vectors,
            batch_size=batch_size,
            fallback=fallback,
        )
        super().__init__(**settings, **kwargs)
        self._compressor = compressor
        self._policy = chosen
        if fidelity is not None or gate is not None:
            self._policy = TextBelowFidelity(_threshold(compressor, fidelity, gate, query_aware), chosen)
        if placeholders is None:
            placeholders = shared_store(compressor.reader) if cache is None else PlaceholderStore(cache)
        self._placeholders = placeholders
        self._source = PassageSource(
            compressor, placeholders.cache if cache is None else cache, store, gate=gate, batch_size=batch_size
        )

    @classmethod
    def class_name(cls) -> str:
        return "CompressedContextPostprocessor"

    @property
    def cache(self) -> PassageCache:
        """The cache of compressed passages."""
        return self._source.cache

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        start = time.perf_counter()
        query = None if query_bundle is None else query_bundle.query_str
        refuse_placeholders(query)
        if not nodes:
            return []
        request = RetrievedPassages(
            self._source,
            [scored for scored in nodes if text_of(scored.node) is not None],
            query=query if self.query_aware else None,
            ratio=self.ratio,
            vectors=self.reuse_vectors,
            around=self._around,
            fallback=self.fallback,
        )
        forms = self._choose(request)
        passages = self._passages(request, forms)
        contents = dict(zip(passages, self._placeholders.issue(list(passages.values()))))
        out = []
        places = iter(range(len(forms)))
        for scored in nodes:
            place = next(places) if text_of(scored.node) is not None else None
            form = TEXT if place is None else forms[place]
            if form.read != "left out":
                node = (
                    self._compressed(scored.node, contents[place], passages[place])
                    if place in contents
                    else _escaped(scored.node)
                )
                out.append(NodeWithScore.model_construct(node=node, score=scored.score))
        _dispatcher.event(
            CompressionEvent(
                passages=len(passages),
                compressed=request.compressed,
                cache_hits=request.cache_hits,
                source_tokens=sum(p.source_tokens for p in passages.values()),
                slots=sum(p.slots for p in passages.values()),
                as_text=len(out) - len(passages),
                fallbacks=sum(form.read == "compressed" for form in forms) - len(passages),
                unfaithful=sum(form.why == "fidelity" for form in forms),
                left_out=len(nodes) - len(out),
                ms=(time.perf_counter() - start) * 1e3,
            )
        )
        return out

    def _choose(self, request: RetrievedPassages) -> list[Form]:
        if not request.nodes:
            return []
        forms = list(self._policy.choose(request))
        if len(forms) != len(request.nodes) or not all(isinstance(form, Form) for form in forms):
            raise ValueError(
                f"{self._policy!r} must choose one Form for each of {len(request.nodes)} passages, got {forms!r:.200}."
            )
        if left_out := sum(form.read == "left out" for form in forms):
            _log.warning("%d of %d passages found no room in %r and are left out.", left_out, len(forms), self._policy)
        return forms

    def _passages(self, request: RetrievedPassages, forms: Sequence[Form]) -> dict[int, CompressedPassage]:
        """The passages to read in compressed form, by place in rank."""
        by_ratio = compressed_by_ratio(forms)
        if by_ratio and self._compressor.interface != "text":
            self._check_llm()
        found = {
            place: passage
            for ratio, places in by_ratio.items()
            for place, passage in zip(places, request.passages(ratio, places))
        }
        return {
            place: passage
            for place, passage in sorted(found.items())
            if passage is not None and self._fits(request.nodes[place], passage)
        }

    def _check_llm(self) -> None:
        compressor = self._compressor
        if ReadingLLM.of(compressor.reader.fingerprint):
            return
        if getattr(compressor, "base_reader", compressor.reader) is not compressor.reader:
            raise ValueError(
                f"{type(compressor).__name__} tunes its reader, and no CompressedContextLLM reads with the tuned one: build "
                "the LLM with CompressedContextLLM(compressor.reader)."
            )
        raise ValueError(
            "No CompressedContextLLM reads with the compressor's reader, so nothing could read the compressed passages; "
            "pass llm=CompressedContextLLM(reader) to the query engine, or use a compressor to text."
        )

    def _fits(self, node: BaseNode, passage: CompressedPassage) -> bool:
        """Whether some LLM's prompt has room for the passage; raises if not, unless text is allowed instead."""
        if passage.interface == "text":
            return True
        llms = ReadingLLM.of(self._compressor.reader.fingerprint)
        room = max((llm.window - llm.num_output if llm.window else math.inf for llm in llms), default=math.inf)
        if passage.places <= room:
            return True
        sentence = f"Node {node.node_id} takes {passage.places} positions, but a prompt has {room} positions besides the answer"
        if not self.fallback:
            raise ValueError(f"{sentence}; use smaller chunks, a higher compression ratio or a smaller max_new_tokens.")
        _log.warning("%s; it is read as text.", sentence)
        return False

    def _compressed(self, node: BaseNode, content: str, passage: CompressedPassage) -> BaseNode:
        return read_as(node, self._around(node, content) if content else content, self._placeholders, passage)

    def _around(self, node: BaseNode, content: str) -> str:
        """A compressed passage with the node's metadata, if the LLM is to see it."""
        metadata = escape_placeholders(node.get_metadata_str(MetadataMode.LLM).strip()) if self.keep_metadata else ""
        if not metadata:
            return content
        return node.text_template.format(content=content, metadata_str=metadata).strip()  # type: ignore[attr-defined]


def _escaped(node: BaseNode) -> BaseNode:
    """The node itself, or a copy if its text contains something like a placeholder."""
    content = node.get_content(MetadataMode.LLM)
    harmless = escape_placeholders((text_of(node) or "") if is_placeholder(content) else content)
    return node if content == harmless or text_of(node) is None else read_as(node, harmless)


def _threshold(compressor: Compressor, fidelity: str | float | None, gate: Any, query_aware: bool) -> float:
    """The score below which passages are read as text; raises unless gate and compressor fit."""
    if gate is None or fidelity is None:
        raise ValueError(
            'fidelity and gate go together: CompressedContextPostprocessor(compressor, fidelity="high", gate=gate), the gate '
            "calibrated with `nutgraf bench gate` or FidelityGate.fit."
        )
    if not isinstance(gate, FidelityGate):
        raise TypeError(f"gate must be a FidelityGate, got {type(gate).__name__}.")
    if query_aware:
        raise ValueError(
            "A fidelity gate judges passages when they are compressed, before there is a question; use fidelity without "
            "query_aware."
        )
    gate.check_fits(compressor)
    return gate.threshold(fidelity)
