"""The passages of one request, each looked up or compressed at most once per ratio."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from ...compressors import CompressedPassage
from ..placeholders.placeholder import escape_placeholders
from ..placeholders.source import PassageSource
from .nodes import text_of

_log = logging.getLogger(__name__)
_JOINT = "\n\n"  # LlamaIndex puts it between passages
_SLOTS = "\0"


class RetrievedPassages:
    """The passages of one request. Implements `Retrieved`, the view that a `Policy` gets.

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
        self.nodes = [scored.node for scored in nodes]
        self.compressed = self.cache_hits = 0
        self._source = source
        self._query = query
        self._ratio = ratio
        self._vectors = vectors
        self._around = around
        self._fallback = fallback
        self._found: dict[tuple[int, float | None], CompressedPassage | None] = {}

    def text_positions(self) -> list[int]:
        """Reader positions of each passage as text, including a blank line."""
        return self._text_positions

    @functools.cached_property
    def _text_positions(self) -> list[int]:
        return [self._count(escape_placeholders(node.get_content(MetadataMode.LLM))) for node in self.nodes]

    def compressed_positions(self, ratio: float | None, places: Sequence[int]) -> list[int]:
        """Reader positions of the passages at ``places``, compressed now by ``ratio`` (``None``: the default ratio)."""
        return [
            self._text_positions[place] if passage is None else self._count_compressed(place, passage)
            for place, passage in zip(places, self.passages(ratio, places))
        ]

    def fidelities(self, ratio: float | None, places: Sequence[int]) -> list[float | None]:
        """The gate's scores of the passages at ``places``, compressed by ``ratio``; ``None``: not compressible."""
        gate = self._source.gate
        if gate is None:
            raise ValueError("Fidelity needs a gate: CompressedContextPostprocessor(..., fidelity=..., gate=gate).")
        found = dict(zip(places, self.passages(ratio, places)))
        there = {place: passage for place, passage in found.items() if passage is not None}
        texts = [text_of(self.nodes[place]) or "" for place in there]
        scores = dict(zip(there, gate.scores(list(there.values()), texts)))
        return [scores.get(place) for place in places]

    def passages(self, ratio: float | None, places: Sequence[int]) -> list[CompressedPassage | None]:
        """The compressed passages at ``places``; ``None``: not compressible (only with ``fallback``)."""
        if new := [place for place in places if (place, ratio) not in self._found]:
            try:
                self._get(ratio, new)
            except Exception:
                if not self._fallback:
                    raise
                for place in new:  # one bad passage must not affect the others
                    self._get_or_give_up(ratio, place)
        return [self._found[place, ratio] for place in places]

    def _get(self, ratio: float | None, places: Sequence[int]) -> None:
        nodes = [self.nodes[place] for place in places]
        passages, compressed = self._source.get(
            [text_of(node) or "" for node in nodes],
            query=self._query,
            ratio=self._ratio if ratio is None else ratio,
            vectors=[node.embedding for node in nodes] if self._vectors else None,
        )
        self.compressed += compressed
        self.cache_hits += len(passages) - compressed
        self._found.update(((place, ratio), passage) for place, passage in zip(places, passages))

    def _get_or_give_up(self, ratio: float | None, place: int) -> None:
        try:
            self._get(ratio, [place])
        except Exception as error:
            _log.warning("Node %s is read as text: it could not be compressed: %s", self.nodes[place].node_id, error)
            self._found[place, ratio] = None

    def _count_compressed(self, place: int, passage: CompressedPassage) -> int:
        if not passage.slots:
            return 0
        *before, after = self._around(self.nodes[place], _SLOTS).split(_SLOTS)
        return passage.places + sum(self._count(text, "") for text in before) + self._count(after)

    def _count(self, text: str, joint: str = _JOINT) -> int:
        return len(self._source.compressor.reader.tokenize(text + joint)) if text + joint else 0
