"""In-memory store, for scripts and notebooks."""

from __future__ import annotations

import heapq
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...compressors import CompressedPassage
from .base import Entry, Facts, Listed, Maker, MakerStats, PassageKey, PassageStore, StoreStats, merged

GIBIBYTE = 2**30


class MemoryStore(PassageStore):
    """Compressed passages in memory; evicts the least recently used.

    Args:
        max_bytes: bound on the bytes of slots and texts; a larger entry is not kept.

    Raises:
        ValueError: if ``max_bytes`` is not positive.
    """

    def __init__(self, max_bytes: int = 4 * GIBIBYTE) -> None:
        if max_bytes < 1:
            raise ValueError(f"A store must hold at least one byte, got {max_bytes=}.")
        self.max_bytes = max_bytes
        self.name = f"memory:{secrets.token_hex(8)}"
        self._entries: OrderedDict[PassageKey, Entry] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            held = {**self.__dict__, "_entries": self._entries.copy()}
        return {name: value for name, value in held.items() if name not in ("_lock", "name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.name, self._lock = f"memory:{secrets.token_hex(8)}", threading.Lock()  # a store of its own

    def get_many(self, keys: Sequence[PassageKey]) -> list[CompressedPassage | None]:
        with self._lock:
            for key in keys:
                if key in self._entries:
                    self._entries.move_to_end(key)
            return [entry.passage if (entry := self._entries.get(key)) is not None else None for key in keys]

    def put_many(self, entries: Sequence[Entry]) -> None:
        given = merged(entries)
        with self._lock:
            stored = given.keys() & self._entries.keys()
            for key, entry in given.items():
                own = replace(entry, passage=_own(entry.passage))
                if key not in stored and _size(own) <= self.max_bytes:
                    self._entries[key] = own
                    self._nbytes += _size(own)
            self._evict()
        self.describe({key: given[key].facts for key in stored})

    def _evict(self) -> None:
        while self._nbytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._nbytes -= _size(oldest)

    def facts(self, keys: Iterable[PassageKey]) -> dict[PassageKey, Facts]:
        with self._lock:
            return {key: self._entries[key].facts for key in keys if key in self._entries}

    def _replace_facts(self, facts: Mapping[PassageKey, Facts]) -> None:
        with self._lock:
            for key in facts.keys() & self._entries.keys():
                before, after = self._entries[key], self._entries[key].with_facts(facts[key])
                self._entries[key] = after
                self._nbytes += _size(after) - _size(before)
            self._evict()

    def delete(self, keys: Iterable[PassageKey]) -> int:
        with self._lock:
            gone = [entry for key in set(keys) if (entry := self._entries.pop(key, None)) is not None]
            self._nbytes -= sum(map(_size, gone))
        return len(gone)

    def missing(self, keys: Iterable[PassageKey]) -> list[PassageKey]:
        with self._lock:
            return [key for key in dict.fromkeys(keys) if key not in self._entries]

    def ids(self, after: str = "", limit: int = 100) -> list[str]:
        with self._lock:
            return heapq.nsmallest(limit, (key.id for key in self._entries if key.id > after))

    def listed(self, ids: Iterable[str]) -> dict[str, Listed]:
        wanted = set(ids)
        with self._lock:
            found = {key.id: entry for key, entry in self._entries.items() if key.id in wanted}
        out = {}
        for name, entry in found.items():
            one = entry.passage
            out[name] = Listed(entry.key, one.interface, one.source_tokens, one.slots, one.nbytes, entry.about)
        return out

    def entries(self, maker: Maker | None = None) -> Iterator[Entry]:
        with self._lock:
            found = list(self._entries.values())
        return (entry for entry in found if maker is None or entry.key.maker == maker)

    @property
    def stats(self) -> StoreStats:
        """Totals as of now; ``nbytes`` counts slots only."""
        with self._lock:
            entries = list(self._entries.values())
        sums: dict[tuple[Maker, str], list[int]] = {}
        for entry in entries:
            passage = entry.passage
            one = (1, passage.slots, passage.source_tokens, passage.nbytes)
            kind = (entry.key.maker, passage.interface)
            sums[kind] = [a + b for a, b in zip(sums.get(kind, (0, 0, 0, 0)), one)]
        makers = sorted((MakerStats(*kind, *total) for kind, total in sums.items()), key=lambda made: -made.passages)
        return StoreStats(len(entries), sum(m.nbytes for m in makers), tuple(makers), {"max_bytes": self.max_bytes})


def _own(passage: CompressedPassage) -> CompressedPassage:
    """Copy to the CPU: a view would keep the whole batch it was cut from in memory."""
    return passage.detach().map(lambda tensor: tensor.cpu().clone())


def _size(entry: Entry) -> int:
    return entry.passage.nbytes + len((entry.text or "").encode("utf-8", "surrogatepass")) + 8 * len(entry.vector or ())
