"""Compressed passages from a cache, a store or the compressor, whichever has them first."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

from ...compressors import CompressedPassage, Compressor, FidelityGate
from ...compressors.core.textfiles import check_strings
from ..checks import check_compressor
from ..store import PassageStore, explain_missing, get_or_compress, keys_for
from .cache import PassageCache

_log = logging.getLogger(__name__)
Vector = Sequence[float] | None


class PassageSource:
    """Looks passages up in the cache, then in the store, and compresses the rest.

    Passages that share a budget are neither looked up nor kept: what remains of one depends on the others of the call.

    Args:
        compressor: compresses passages found nowhere.
        cache: passages that this process has read or compressed.
        store: passages compressed at indexing time; new ones are added unless it is read-only.
        gate: measures what survived of each passage not measured yet.
        batch_size: passages compressed at a time.

    Raises:
        TypeError: if ``compressor`` is not a compressor.
    """

    def __init__(
        self,
        compressor: Compressor,
        cache: PassageCache,
        store: PassageStore | None = None,
        *,
        gate: FidelityGate | None = None,
        batch_size: int | None = None,
    ) -> None:
        check_compressor(compressor)
        self.compressor = compressor
        self.cache = cache
        self.store = store
        self.gate = gate
        self.batch_size = batch_size
        self._warned = False

    def get(
        self,
        texts: Sequence[str],
        *,
        query: str | None = None,
        ratio: float | None = None,
        vectors: Sequence[Vector] | None = None,
    ) -> tuple[list[CompressedPassage], int]:
        """Return the compressed passages in order and how many were compressed now.

        Args:
            texts: the passages.
            query: the question, for a query-aware compressor.
            ratio: compression ratio L / l; default: the compressor's own.
            vectors: retrieval vectors for a compressor that takes them, one (or ``None``) per text.
        """
        texts = check_strings("texts", texts, "passages")
        given: Sequence[Vector] = vectors or [None] * len(texts)
        if self.compressor.pools_budget:
            passages = self.compressor.compress(texts, query, ratio, vectors=vectors)
            return passages if self.gate is None else self.gate.mark(passages, texts), len(texts)
        stored = keys_for(self.compressor, texts, ratio=ratio, query=query)
        # The store assumes one vector per text; here a vector of another embedder makes another passage.
        keys: list[Hashable] = [key if v is None else (key, tuple(v)) for key, v in zip(stored, given)]
        compressed = 0

        def run(places: Sequence[int]) -> list[CompressedPassage]:
            nonlocal compressed
            compressed += len(places)
            picked = [given[i] for i in places]
            passages = self.compressor.compress(
                [texts[i] for i in places],
                query=query,
                ratio=ratio,
                vectors=picked if any(vector is not None for vector in picked) else None,
                batch_size=self.batch_size,
            )
            return passages if self.gate is None else self.gate.mark(passages, [texts[i] for i in places])

        def look_up_or_run(places: Sequence[int]) -> list[CompressedPassage]:
            if self.store is None:
                return run(places)
            passages, new = get_or_compress(
                self.store,
                [stored[i] for i in places],
                [texts[i] for i in places],
                lambda missing: run([places[i] for i in missing]),
            )
            if new and not self._warned:
                self._warned = True  # once, not for every request
                _log.warning(
                    "%d of %d passages were not in the store %s and were compressed at query time%s",
                    len(new),
                    len(places),
                    self.store.name,
                    explain_missing(self.store, stored[0].maker),
                )
            return passages

        passages = self.cache.get_or_compress(keys, look_up_or_run)
        return self._measured(texts, keys, passages), compressed

    def _measured(
        self, texts: Sequence[str], keys: Sequence[Hashable], passages: list[CompressedPassage]
    ) -> list[CompressedPassage]:
        """Measure passages that were stored or cached without the gate's signals."""
        if self.gate is None:
            return passages
        new = {key: place for place, key in enumerate(keys) if not self.gate.is_marked(passages[place])}
        if not new:
            return passages
        places = list(new.values())
        marked = self.gate.mark([passages[i] for i in places], [texts[i] for i in places])
        found = {key: self.cache.put(key, passage) for key, passage in zip(new, marked)}
        return [found.get(key, passage) for key, passage in zip(keys, passages)]
