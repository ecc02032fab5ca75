"""The passages of one request: looked up or compressed as its policy asks, none of them twice."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from ...compressors import CompressedPassage, Compressor, FidelityGate
from ..placeholders.cache import PassageCache
from ..placeholders.placeholder import Issued, escape_placeholders
from ..store import PassageStore, explain_missing, get_or_compress, keys_for
from .nodes import text_of

_log = logging.getLogger(__name__)
_JOINT = "\n\n"  # LlamaIndex puts it between passages
_SLOTS = "\0"


@dataclass(frozen=True)
class Wanted:
    """A passage that is to be compressed: its text, the question and the retrieval vector if the compressor takes them."""

    text: str
    query: str | None
    vector: list[float] | None
    ratio: float | None


class PassageSource:
    """Where a postprocessor's compressed passages come from: its cache, the store they were indexed into, the compressor.

    Args:
        compressor: compresses what is nowhere to be found.
        cache: what this process has read or compressed before.
        indexed: what was compressed when it was indexed.
        batch_size: passages compressed at a time.
        gate: measures what is compressed, and what was stored without being measured.
    """

    def __init__(
        self,
        compressor: Compressor,
        cache: PassageCache,
        indexed: PassageStore | None,
        batch_size: int | None,
        gate: FidelityGate | None = None,
    ) -> None:
        self.compressor = compressor
        self.gate = gate
        self.cache = cache
        self.indexed = indexed
        self.batch_size = batch_size
        self.reader = None if compressor.reader is None else compressor.reader.fingerprint
        self._warned = False

    def get(self, wanted: Sequence[Wanted]) -> tuple[list[CompressedPassage], int]:
        """The passages (all of one query and ratio) in order, and how many of them had to be compressed now."""
        compressed = 0

        def compress(places: Sequence[int]) -> list[CompressedPassage]:
            nonlocal compressed
            made, n = self._look_up_or_run([wanted[i] for i in places])
            compressed += n
            return made

        keys = self._keys(wanted)
        return self._marked(wanted, keys, self.cache.get_or_compress(keys, compress)), compressed

    def _marked(
        self, wanted: Sequence[Wanted], keys: Sequence[str], passages: list[CompressedPassage]
    ) -> list[CompressedPassage]:
        """The passages with the gate's signals; those that had none (stored, or cached, without a gate) get them now."""
        if self.gate is None:
            return passages
        new = {key: place for place, key in enumerate(keys) if not self.gate.is_marked(passages[place])}
        if not new:
            return passages
        places = list(new.values())
        made = self.gate.mark([passages[place] for place in places], [wanted[place].text for place in places])
        found = dict(zip(new, made))
        for key, passage in found.items():
            self.cache.put(key, passage)
        return [found.get(key, passage) for key, passage in zip(keys, passages)]

    def issued(self, wanted: Wanted, passage: CompressedPassage) -> Issued:
        """What a placeholder for a passage has to know."""
        again = functools.partial(lambda w: self._look_up_or_run([w])[0][0], wanted)
        return Issued(self._keys([wanted])[0], passage.slots, passage.reader, again)

    def _keys(self, wanted: Sequence[Wanted]) -> list[str]:
        compressor = self.compressor.fingerprint
        return [
            self.cache.key(
                w.text, compressor=compressor, reader=self.reader, query=w.query, ratio=w.ratio, vector=w.vector
            )
            for w in wanted
        ]

    def _look_up_or_run(self, wanted: Sequence[Wanted]) -> tuple[list[CompressedPassage], int]:
        if self.indexed is None:
            return self._run(wanted), len(wanted)
        texts = [w.text for w in wanted]
        keys = keys_for(self.compressor, texts, ratio=wanted[0].ratio, query=wanted[0].query)
        run: Callable[[list[int]], list[CompressedPassage]] = lambda places: self._run([wanted[i] for i in places])  # noqa: E731
        passages, compressed = get_or_compress(self.indexed, keys, texts, run)
        if compressed and not self._warned:
            self._warned = True  # once, not at each request
            _log.warning(
                "%d of %d passages were not in the store %s and were compressed at query time%s",
                len(compressed),
                len(texts),
                self.indexed.name,
                explain_missing(self.indexed, keys[compressed[0]].maker),
            )
        return passages, len(compressed)

    def _run(self, wanted: Sequence[Wanted]) -> list[CompressedPassage]:
        vectors = [w.vector for w in wanted]
        passages = self.compressor.compress(
            [w.text for w in wanted],
            query=wanted[0].query,
            ratio=wanted[0].ratio,
            vectors=vectors if any(vector is not None for vector in vectors) else None,
            batch_size=self.batch_size,
        )
        return passages if self.gate is None else self.gate.mark(passages, [w.text for w in wanted])


class Request:
    """The passages of one request; what a `Policy` sees of them (it is a `Retrieved`).

    Args:
        source: gives the compressed passages.
        nodes: the retrieved nodes that hold text, in order.
        query: the question, for a compressor that reads it.
        ratio: the compression ratio where a policy asks for none.
        vectors: give the nodes' retrieval vectors to the compressor.
        around: puts a node's metadata around its compressed passage.
        fallback: let a passage that cannot be compressed be text, instead of raising.

    Attributes:
        compressed: passages compressed for this request so far.
        cache_hits: passages found in the cache or the store so far.
    """

    def __init__(
        self,
        source: PassageSource,
        nodes: Sequence[NodeWithScore],
        *,
        query: str | None,
        ratio: float | None,
        vectors: bool,
        around: Callable[[BaseNode, str], str],
        fallback: bool,
    ) -> None:
        self.scores = [scored.score for scored in nodes]
        self.compressed = self.cache_hits = 0
        self._source = source
        self._nodes = [scored.node for scored in nodes]
        self._query = query
        self._ratio = ratio
        self._vectors = vectors
        self._around = around
        self._fallback = fallback
        self._found: dict[tuple[int, float | None], CompressedPassage | None] = {}

    # -- what a policy asks ----------------------------------------------------------------------------------------

    def text_positions(self) -> list[int]:
        """Reader positions of each passage as text, a blank line included."""
        return self._text_positions

    @functools.cached_property
    def _text_positions(self) -> list[int]:
        return [self._count(escape_placeholders(node.get_content(MetadataMode.LLM))) for node in self._nodes]

    def compressed_positions(self, ratio: float | None, places: Sequence[int]) -> list[int]:
        """Reader positions of the passages at ``places``, compressed now by ``ratio`` (``None``: the postprocessor's)."""
        passages = zip(places, self.passages(ratio, places))
        return [
            self._text_positions[place] if passage is None else self._count_compressed(place, passage)
            for place, passage in passages
        ]

    def fidelities(self, ratio: float | None, places: Sequence[int]) -> list[float | None]:
        """The gate's score of the passages at ``places``, compressed by ``ratio``; ``None``: could not be compressed."""
        gate = self._source.gate
        if gate is None:
            raise ValueError(
                "Fidelity is judged by a gate: CompressedContextPostprocessor(..., fidelity=..., gate=gate)."
            )
        passages = self.passages(ratio, places)
        there = [place for place, passage in enumerate(passages) if passage is not None]
        texts = [self.wanted(places[place], ratio).text for place in there]
        scores = dict(zip(there, gate.scores([p for p in passages if p is not None], texts)))
        return [scores.get(place) for place in range(len(passages))]

    def _count_compressed(self, place: int, passage: CompressedPassage) -> int:
        if not passage.slots:
            return 0
        *before, after = self._around(self._nodes[place], _SLOTS).split(_SLOTS)
        return passage.slots + sum(self._count(text, "") for text in before) + self._count(after)

    def _count(self, text: str, joint: str = _JOINT) -> int:
        reader = self._source.compressor.reader
        if reader is None:
            raise ValueError("A budget in reader positions needs a reader to count them; give the compressor one.")
        return len(reader.tokenize(text + joint)) if text + joint else 0

    # -- passages --------------------------------------------------------------------------------------------------

    def passages(self, ratio: float | None, places: Sequence[int]) -> list[CompressedPassage | None]:
        """The compressed passages at some places; ``None`` for what cannot be compressed, where that may be text."""
        if new := [place for place in places if (place, ratio) not in self._found]:
            try:
                self._get(ratio, new)
            except Exception:
                if not self._fallback:
                    raise
                for place in new:  # one bad passage spoils no other
                    self._get_or_give_up(ratio, place)
        return [self._found[place, ratio] for place in places]

    def wanted(self, place: int, ratio: float | None) -> Wanted:
        """What is asked for at a place."""
        node = self._nodes[place]
        vector = node.embedding if self._vectors else None
        return Wanted(text_of(node) or "", self._query, vector, self._ratio if ratio is None else ratio)

    def _get(self, ratio: float | None, places: Sequence[int]) -> None:
        passages, compressed = self._source.get([self.wanted(place, ratio) for place in places])
        self.compressed += compressed
        self.cache_hits += len(passages) - compressed
        self._found.update(((place, ratio), passage) for place, passage in zip(places, passages))

    def _get_or_give_up(self, ratio: float | None, place: int) -> None:
        try:
            self._get(ratio, [place])
        except Exception as error:
            _log.warning("Node %s is read as text: it could not be compressed: %s", self._nodes[place].node_id, error)
            self._found[place, ratio] = None
