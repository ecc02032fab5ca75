"""A bounded store of compressed passages, so that a passage that is retrieved again is not compressed again."""

from __future__ import annotations

import hashlib
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...compressors import CompressedPassage

GIBIBYTE = 2**30


@dataclass(frozen=True)
class CacheStats:
    """What a `PassageCache` has done so far.

    Attributes:
        hits: passages that were found.
        misses: passages that had to be compressed.
        evictions: passages that made room for others.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class PassageCache:
    """Compressed passages, least recently used first out, bounded in number and in bytes; safe to share by threads.

    The tensors stay on the device on which the compressor made them. A passage that alone is larger than ``max_bytes`` is
    handed through and not kept.

    Args:
        max_passages: the most passages that are kept.
        max_bytes: the most tensor bytes that are kept.
        secret: the key of the cache's MACs, 16 to 64 bytes; random if not given.

    Raises:
        ValueError: if a bound is not positive, or the secret too short or too long.
    """

    def __init__(self, max_passages: int = 65_536, max_bytes: int = GIBIBYTE, *, secret: bytes | None = None) -> None:
        if max_passages < 1 or max_bytes < 1:
            raise ValueError(
                f"A cache must hold at least one passage of one byte, got {max_passages=} and {max_bytes=}."
            )
        if secret is not None and not 16 <= len(secret) <= 64:
            raise ValueError(f"A cache's secret must be 16 to 64 bytes, got {len(secret)}.")
        self.max_passages = max_passages
        self.max_bytes = max_bytes
        self.secret = secrets.token_bytes(32) if secret is None else secret
        self._passages: OrderedDict[str, CompressedPassage] = OrderedDict()
        self._nbytes = 0
        self._stats = CacheStats()
        self._lock = threading.Lock()  # guards the table; held for moments
        self._filling = threading.Lock()  # one compression at a time, so that no passage is compressed twice

    def key(
        self,
        text: str,
        *,
        compressor: str,
        reader: str | None,
        query: str | None = None,
        ratio: float | None = None,
        vector: Sequence[float] | None = None,
    ) -> str:
        """The key of a passage: a MAC over everything that decides what its compressed form is.

        Args:
            text: the passage.
            compressor, reader: their fingerprints (``None``: any reader).
            query: the question, for a compressor that reads it.
            ratio: the compression ratio asked for.
            vector: the retrieval vector that stands in for the text, where the compressor takes one.

        Returns:
            32 hexadecimal digits that differ between caches, as each has a secret of its own.
        """
        mac = hashlib.blake2b(key=self.secret, digest_size=16, person=b"passage")
        numbers = None if vector is None else array("d", vector).tobytes()
        for part in (text, compressor, reader, query, None if ratio is None else str(float(ratio)), numbers):
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part or b""
            mac.update(b"%d:%d:" % (part is None, len(data)))  # lengths first: no two lists of parts look alike
            mac.update(data)
        return mac.hexdigest()

    def get(self, key: str) -> CompressedPassage | None:
        """The passage under a key, or ``None``; a passage that is asked for counts as just used."""
        with self._lock:
            passage = self._passages.get(key)
            if passage is None:
                self._stats = replace(self._stats, misses=self._stats.misses + 1)
                return None
            self._passages.move_to_end(key)
            self._stats = replace(self._stats, hits=self._stats.hits + 1)
            return passage

    def put(self, key: str, passage: CompressedPassage) -> None:
        """Keeps a passage, and lets the least recently used ones go where it would pass a bound."""
        passage = _compact(passage)
        size = passage.nbytes
        with self._lock:
            if (before := self._passages.pop(key, None)) is not None:
                self._nbytes -= before.nbytes
            if size > self.max_bytes:
                return
            self._passages[key] = passage
            self._nbytes += size
            evicted = 0
            while len(self._passages) > self.max_passages or self._nbytes > self.max_bytes:
                _, oldest = self._passages.popitem(last=False)
                self._nbytes -= oldest.nbytes
                evicted += 1
            self._stats = replace(self._stats, evictions=self._stats.evictions + evicted)

    def get_or_compress(
        self, keys: Sequence[str], compress: Callable[[list[int]], Sequence[CompressedPassage]]
    ) -> list[CompressedPassage]:
        """The passages under the keys; those that are not there are compressed together and kept.

        Args:
            keys: one a passage, in order; the same key may come more than once.
            compress: given the places in ``keys`` of what is missing, returns one compressed passage for each. It is never
                called by two threads at once, and a passage that another thread compresses meanwhile is waited for.

        Raises:
            ValueError: if ``compress`` returns another number of passages than was asked for.
        """
        found = {key: passage for key in dict.fromkeys(keys) if (passage := self.get(key)) is not None}
        if len(found) < len(set(keys)):
            with self._filling:
                self._fill(keys, compress, found)
        return [found[key] for key in keys]

    def _fill(
        self,
        keys: Sequence[str],
        compress: Callable[[list[int]], Sequence[CompressedPassage]],
        found: dict[str, CompressedPassage],
    ) -> None:
        missing: dict[str, int] = {}
        for place, key in enumerate(keys):
            if key in found or key in missing:
                continue
            with self._lock:
                passage = self._passages.get(key)  # another thread may have been faster
            if passage is None:
                missing[key] = place
            else:
                found[key] = passage
        if not missing:
            return
        passages = compress(list(missing.values()))
        if len(passages) != len(missing):
            raise ValueError(f"The compressor was given {len(missing)} passages and returned {len(passages)}.")
        for key, passage in zip(missing, passages):
            found[key] = passage
            self.put(key, passage)

    def clear(self) -> None:
        """Lets every passage go."""
        with self._lock:
            self._passages.clear()
            self._nbytes = 0

    def __len__(self) -> int:
        return len(self._passages)

    def __contains__(self, key: str) -> bool:
        return key in self._passages

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors (and shorter texts) that are kept."""
        return self._nbytes

    @property
    def stats(self) -> CacheStats:
        """Hits, misses and evictions so far."""
        return self._stats


def _compact(passage: CompressedPassage) -> CompressedPassage:
    """The passage without the batch it was cut from: a view would keep the whole batch in memory."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor

    if passage.embeds is not None:
        return replace(passage, embeds=own(passage.embeds))
    if passage.keys and passage.values:
        return replace(passage, keys=tuple(map(own, passage.keys)), values=tuple(map(own, passage.values)))
    return passage
