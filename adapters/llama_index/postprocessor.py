"""The postprocessor that replaces what the LLM reads of retrieved nodes by compressed passages."""

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
from ..placeholders.cache import PassageCache
from ..placeholders.placeholder import (
    PlaceholderStore,
    ReadingLLM,
    escape_placeholders,
    holds_placeholder,
    shared_store,
)
from ..store import PassageStore
from .events import CompressionEvent
from .nodes import read_as, text_of
from .policy import Form, Policy, TextBelowFidelity, as_policy, policy_to_dict
from .request import PassageSource, Request

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
        policy: which nodes the LLM reads as text, which compressed and by what ratio: `TextForTop`, `TextAbove`,
            `TokenBudget`, `AutoBudget`, `ScoreBudget` or a `Policy` of your own; default: all compressed.
        fidelity: let the LLM read the text of passages that did not survive their compression: ``"low"``, ``"medium"``,
            ``"high"`` or the least probability, in (0, 1), that an answer from the slots is as good as one from the text
            (`FidelityGate.threshold`). Needs ``gate``; applies to what ``policy`` would have compressed.
        gate: a calibrated `FidelityGate` of the compressor. Its signals are kept with the passages: give it to
            `CompressPassages` too, and passages are measured once, when they are indexed.
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
        fallback: let the LLM read the text of a passage that cannot be compressed, or takes more slots than a prompt has
            room for, instead of raising; the log and the `CompressionEvent` say so.

    Raises:
        TypeError: if ``compressor``, ``policy`` or ``gate`` is none.
        ValueError: if ``as_text`` is asked of a compressor that gives no text, a number is out of range, the gate is not
            calibrated or another compressor's, or fidelity is asked of passages that depend on the question or a budget.

    Example::

        engine = index.as_query_engine(
            llm=CompressedContextLLM(reader), node_postprocessors=[CompressedContextPostprocessor(compressor)]
        )
    """

    ratio: float | None = Field(default=None, ge=1, description="Compression ratio L / l.")
    policy: dict[str, Any] = Field(description="Which nodes stay text, by name and settings.")
    fidelity: str | float | None = Field(default=None, description="What a passage must have kept to be compressed.")
    keep_metadata: bool = Field(default=False, description="Show the LLM the nodes' metadata as text.")
    query_aware: bool = Field(default=False, description="Pass the question to the compressor.")
    reuse_vectors: bool = Field(default=False, description="Pass the nodes' retrieval vectors to the compressor.")
    batch_size: int | None = Field(default=None, ge=1, description="Passages compressed at a time.")
    fallback: bool = Field(default=False, description="Text for what cannot be compressed.")
    _compressor: Compressor = PrivateAttr()
    _policy: Policy = PrivateAttr()
    _store: PlaceholderStore = PrivateAttr()
    _source: PassageSource = PrivateAttr()

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: float | None = None,
        policy: Policy | Mapping[str, Any] | None = None,
        fidelity: str | float | None = None,
        gate: FidelityGate | None = None,
        keep_metadata: bool = False,
        query_aware: bool | None = None,
        reuse_vectors: bool = False,
        as_text: bool = False,
        cache: PassageCache | PlaceholderStore | None = None,
        store: PassageStore | None = None,
        batch_size: int | None = None,
        fallback: bool = False,
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
            query_aware = compressor.query_aware
        chosen = as_policy(policy)
        deciding: Policy = chosen
        if fidelity is not None or gate is not None:
            deciding = TextBelowFidelity(_threshold(compressor, fidelity, gate, query_aware), chosen)
        settings: dict[str, Any] = {
            "ratio": ratio,
            "policy": policy_to_dict(chosen),
            "fidelity": fidelity,
            "keep_metadata": keep_metadata,
            "query_aware": query_aware,
            "reuse_vectors": reuse_vectors,
            "batch_size": batch_size,
            "fallback": fallback,
        }
        super().__init__(**settings, **kwargs)
        self._compressor = compressor
        self._policy = deciding
        reader = None if compressor.reader is None else compressor.reader.fingerprint
        if isinstance(cache, PlaceholderStore):
            self._store = cache
        elif cache is None and reader is not None:
            self._store = shared_store(reader)
        else:
            self._store = PlaceholderStore(cache)
        self._source = PassageSource(compressor, self._store.cache, store, batch_size, gate)

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
        start = time.perf_counter()
        query = None if query_bundle is None else query_bundle.query_str
        if query is not None and holds_placeholder(query):
            raise ValueError(
                "The question holds a placeholder of a compressed passage, which only a copy from a prompt or a log can "
                "bring there; remove it, or run escape_placeholders over the question."
            )
        places = [place for place, scored in enumerate(nodes) if text_of(scored.node) is not None]
        request = Request(
            self._source,
            [nodes[place] for place in places],
            query=query if self.query_aware else None,
            ratio=self.ratio,
            vectors=self.reuse_vectors,
            around=self._around,
            fallback=self.fallback,
        )
        forms = self._choose(request) if places else []
        read, event = self._read(request, [nodes[place].node for place in places], forms)
        reads = dict(zip(places, read))
        left_out = {place for place, form in zip(places, forms) if form.read == "left out"}
        event.as_text = sum(reads.get(place) is None for place in range(len(nodes))) - len(left_out)
        event.ms = (time.perf_counter() - start) * 1e3
        if nodes:
            _dispatcher.event(event)
        out = []
        for place, scored in enumerate(nodes):
            if place not in left_out:
                content = reads.get(place)
                node = self._escaped(scored.node) if content is None else self._compressed(scored.node, content)
                out.append(NodeWithScore.model_construct(node=node, score=scored.score))
        return out

    # -- reading ---------------------------------------------------------------------------------------------------

    def _choose(self, request: Request) -> list[Form]:
        forms = list(self._policy.choose(request))
        if len(forms) != len(request.scores) or not all(isinstance(form, Form) for form in forms):
            raise ValueError(
                f"{self._policy!r} must choose one Form for each of {len(request.scores)} passages, got {forms!r:.200}."
            )
        if left_out := sum(form.read == "left out" for form in forms):
            _log.warning("%d of %d passages found no room in %r and are left out.", left_out, len(forms), self._policy)
        return forms

    def _read(
        self, request: Request, nodes: Sequence[BaseNode], forms: Sequence[Form]
    ) -> tuple[list[str | None], CompressionEvent]:
        """What the LLM is to read of each node, metadata aside: a placeholder, a shorter text or (``None``) its text."""
        places = [place for place, form in enumerate(forms) if form.read == "compressed"]
        if places and self._compressor.interface != "text":
            self._check_llm()
        found: dict[int, CompressedPassage | None] = {}
        for ratio in dict.fromkeys(forms[place].ratio for place in places):  # those of a ratio together
            same = [place for place in places if forms[place].ratio == ratio]
            found.update(zip(same, request.passages(ratio, same)))
        passages = {
            place: passage for place in places if (passage := self._fitting(nodes[place], found[place])) is not None
        }
        event = CompressionEvent(
            passages=len(passages),
            compressed=request.compressed,
            cache_hits=request.cache_hits,
            source_tokens=sum(p.source_tokens for p in passages.values()),
            slots=sum(p.slots for p in passages.values()),
            fallbacks=len(places) - len(passages),
            unfaithful=sum(form.why == "fidelity" for form in forms),
            left_out=sum(form.read == "left out" for form in forms),
            ms=0.0,
        )
        read: list[str | None] = [None] * len(nodes)
        if self._compressor.interface == "text":
            for place, passage in passages.items():
                read[place] = escape_placeholders(passage.text or "")
            return read, event
        issued = [
            self._source.issued(request.wanted(place, forms[place].ratio), passage)
            for place, passage in passages.items()
        ]
        for place, placeholder in zip(passages, self._store.issue(issued) if issued else ()):
            read[place] = placeholder if passages[place].slots else ""
        return read, event

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_llm(self) -> None:
        if ReadingLLM.of(self._source.reader):
            return
        compressor = self._compressor
        if getattr(compressor, "base_reader", compressor.reader) is not compressor.reader:
            raise ValueError(
                f"{type(compressor).__name__} tunes its reader, and no CompressedContextLLM reads with that one: build "
                "the LLM with CompressedContextLLM(compressor.reader)."
            )
        raise ValueError(
            "No CompressedContextLLM reads with the compressor's reader, so that nothing could read the compressed "
            "passages; pass llm=CompressedContextLLM(reader) to the query engine, or use a compressor to text."
        )

    def _fitting(self, node: BaseNode, passage: CompressedPassage | None) -> CompressedPassage | None:
        """The passage, or ``None`` for text where it has none or fits no prompt and text is allowed instead."""
        if passage is None or passage.interface == "text":
            return passage
        rooms = [llm.window - llm.num_output if llm.window else math.inf for llm in ReadingLLM.of(self._source.reader)]
        if passage.slots <= (room := max(rooms, default=math.inf)):
            return passage
        sentence = (
            f"Node {node.node_id} takes {passage.slots} slots, but a prompt has {room} positions beside the answer"
        )
        if self.fallback:
            _log.warning("%s; it is read as text.", sentence)
            return None
        raise ValueError(f"{sentence}; use smaller chunks, a higher compression ratio or a smaller max_new_tokens.")

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _compressed(self, node: BaseNode, content: str) -> BaseNode:
        return read_as(node, self._around(node, content) if content else content, self._store)

    def _around(self, node: BaseNode, content: str) -> str:
        """What the LLM reads of a node whose compressed passage is ``content``, metadata included."""
        metadata = escape_placeholders(node.get_metadata_str(MetadataMode.LLM).strip()) if self.keep_metadata else ""
        if not metadata:
            return content
        return node.text_template.format(content=content, metadata_str=metadata).strip()  # type: ignore[attr-defined]

    @staticmethod
    def _escaped(node: BaseNode) -> BaseNode:
        """The node as it is, or a copy that is harmless where its text looks like a placeholder."""
        content = node.get_content(MetadataMode.LLM)
        harmless = escape_placeholders(content)
        return node if content == harmless or text_of(node) is None else read_as(node, harmless)


def _threshold(compressor: Compressor, fidelity: str | float | None, gate: Any, query_aware: bool) -> float:
    """The score below which passages are read as text, once gate and compressor are seen to fit."""
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
