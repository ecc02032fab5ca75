"""Bounded in-memory cache of compressed passages."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...compressors import CompressedPassage

GIBIBYTE = 2**30


@dataclass(frozen=True)
class CacheStats:
    """Counts of passages found, passages not found, and passages removed to make room."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class PassageCache:
    """Least-recently-used cache of compressed passages, bounded in number and bytes. Thread-safe.

    Keys are any hashable; adapters use `nutgraf.adapters.store.PassageKey`. Tensors stay on the compressor's device. A
    passage larger than ``max_bytes`` is returned to the caller but not kept.

    Raises:
        ValueError: if a bound is below 1.
    """

    def __init__(self, max_passages: int = 65_536, max_bytes: int = GIBIBYTE) -> None:
        if max_passages < 1 or max_bytes < 1:
            raise ValueError(
                f"A cache must hold at least one passage of one byte, got {max_passages=} and {max_bytes=}."
            )
        self.max_passages = max_passages
        self.max_bytes = max_bytes
        self._passages: OrderedDict[Hashable, CompressedPassage] = OrderedDict()
        self._nbytes = 0
        self._stats = CacheStats()
        self._lock = threading.Lock()  # guards the table; held briefly
        self._filling = threading.Lock()  # one compression at a time, so that no passage is compressed twice

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            held = {**self.__dict__, "_passages": self._passages.copy()}
        return {name: value for name, value in held.items() if name not in ("_lock", "_filling")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._filling = threading.Lock(), threading.Lock()

    def get(self, key: Hashable) -> CompressedPassage | None:
        """Return the passage under a key, or ``None``, and mark it as just used."""
        with self._lock:
            passage = self._passages.get(key)
            if passage is None:
                self._stats = replace(self._stats, misses=self._stats.misses + 1)
                return None
            self._passages.move_to_end(key)
            self._stats = replace(self._stats, hits=self._stats.hits + 1)
            return passage

    def put(self, key: Hashable, passage: CompressedPassage) -> CompressedPassage:
        """Keep a passage, evict old ones beyond the bounds, and return the passage as kept."""
        passage = passage.map(_compact)
        size = passage.nbytes
        with self._lock:
            if (before := self._passages.pop(key, None)) is not None:
                self._nbytes -= before.nbytes
            if size > self.max_bytes:
                return passage
            self._passages[key] = passage
            self._nbytes += size
            evicted = 0
            while len(self._passages) > self.max_passages or self._nbytes > self.max_bytes:
                _, oldest = self._passages.popitem(last=False)
                self._nbytes -= oldest.nbytes
                evicted += 1
            self._stats = replace(self._stats, evictions=self._stats.evictions + evicted)
        return passage

    def get_or_compress(
        self, keys: Sequence[Hashable], compress: Callable[[list[int]], Sequence[CompressedPassage]]
    ) -> list[CompressedPassage]:
        """Return the passages under the keys; compress the missing ones together and keep them.

        Args:
            keys: one per passage, in order; a key may repeat.
            compress: takes the places in ``keys`` of the missing passages and returns one compressed passage each. Never
                called by two threads at once: a passage that another thread is compressing is waited for.

        Raises:
            ValueError: if ``compress`` returns a different number of passages.
        """
        found = {key: passage for key in dict.fromkeys(keys) if (passage := self.get(key)) is not None}
        if len(found) == len(set(keys)):
            return [found[key] for key in keys]
        with self._filling:
            missing: dict[Hashable, int] = {}
            for place, key in enumerate(keys):
                if key in found:
                    continue
                if (passage := self._passages.get(key)) is not None:  # another thread was faster
                    found[key] = passage
                else:
                    missing.setdefault(key, place)
            passages = compress(list(missing.values())) if missing else []
            if len(passages) != len(missing):
                raise ValueError(f"The compressor was given {len(missing)} passages and returned {len(passages)}.")
            for key, passage in zip(missing, passages):
                found[key] = self.put(key, passage)
        return [found[key] for key in keys]

    def discard(self, key: Hashable) -> None:
        """Remove the passage under a key, if it is kept."""
        with self._lock:
            if (gone := self._passages.pop(key, None)) is not None:
                self._nbytes -= gone.nbytes

    def clear(self) -> None:
        """Remove every passage."""
        with self._lock:
            self._passages.clear()
            self._nbytes = 0

    def __len__(self) -> int:
        return len(self._passages)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._passages

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and texts kept."""
        return self._nbytes

    @property
    def stats(self) -> CacheStats:
        """Hits, misses and evictions so far."""
        return self._stats


def _compact(tensor: Tensor) -> Tensor:
    """Copy a view: it would keep the whole batch it was cut from in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor
