"""What every store of compressed passages is: keys, entries, and the interface."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ...compressors import CompressedPassage, Compressor


class StoreError(RuntimeError):
    """A store cannot be read or written: a full or read-only disk, a missing or damaged file.

    It is no ``ValueError`` on purpose: LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
    """


class Maker(NamedTuple):
    """Who made a passage and for whom: fingerprints of compressor and reader, and the ratio that was asked for."""

    compressor: str
    reader: str | None
    ratio: float | None

    @classmethod
    def of(cls, compressor: Compressor, ratio: float | None = None) -> Maker:
        """Return the maker of a compressor's passages."""
        return cls(compressor.fingerprint, compressor.reader.fingerprint, None if ratio is None else float(ratio))


@dataclass(frozen=True)
class PassageKey:
    """Everything that decides what a passage's compressed form is.

    Attributes:
        text: SHA-256 of the text, 64 hexadecimal digits.
        compressor: the compressor's fingerprint.
        reader: the fingerprint of the reader it compresses for; ``None``: any reader.
        ratio: the compression ratio L / l that was asked for; ``None``: the compressor's own.
        query: SHA-256 of the question, for a compressor that reads it.
    """

    text: str
    compressor: str
    reader: str | None
    ratio: float | None = None
    query: str | None = None

    @classmethod
    def of(
        cls, text: str, *, compressor: str, reader: str | None, ratio: float | None = None, query: str | None = None
    ) -> PassageKey:
        """The key of a text (and a question), given as they are."""
        ratio = None if ratio is None else float(ratio)
        return cls(sha256(text), compressor, reader, ratio, None if query is None else sha256(query))

    @property
    def maker(self) -> Maker:
        """Who made it and for whom."""
        return Maker(self.compressor, self.reader, self.ratio)

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits that stand for the key in a table; the same on every machine."""
        parts = json.dumps([self.text, self.compressor, self.reader, self.ratio, self.query])
        return hashlib.sha256(parts.encode()).hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Entry:
    """A passage on its way into a store, or out of it.

    Attributes:
        key: under which it is found.
        passage: the compressed passage.
        text: the original text, which retrieval, citations and a later compressor need; ``None``: not kept.
        vector: its retrieval vector.
        about: JSON-able facts of the caller's own (a document's name, an id).
    """

    key: PassageKey
    passage: CompressedPassage
    text: str | None = None
    vector: Sequence[float] | None = None
    about: Mapping[str, Any] | None = None

    def check(self) -> Entry:
        """Returns itself.

        Raises:
            ValueError: if key, passage and text do not belong together, or a number is NaN or infinite.
        """
        key, passage = self.key, self.passage
        if passage.compressor != key.compressor:
            raise ValueError(
                f"The passage was made by the compressor {passage.compressor}, but its key names {key.compressor}; "
                "make the key with keys_for(compressor, texts)."
            )
        if passage.reader is not None and passage.reader != key.reader:
            raise ValueError(f"The passage was made for the reader {passage.reader}, but its key names {key.reader}.")
        if self.text is not None and sha256(self.text) != key.text:
            raise ValueError("The entry's text is not the one that its key was made of.")
        if self.vector is not None and not all(map(math.isfinite, self.vector)):
            raise ValueError("The entry's retrieval vector holds NaN or infinite numbers; embed the text again.")
        passage.check()
        return self


class Hit(NamedTuple):
    """An entry that a search found, and its distance from the vector searched for (squared L2)."""

    entry: Entry
    distance: float


@dataclass(frozen=True)
class MakerStats:
    """What a store holds of one `Maker`: passages, their slots (reader positions), source tokens and stored bytes."""

    maker: Maker
    interface: str
    passages: int
    slots: int
    source_tokens: int
    nbytes: int

    @property
    def ratio(self) -> float:
        """Compression ratio L / l over all its passages; infinite when something became nothing."""
        if self.slots:
            return self.source_tokens / self.slots
        return math.inf if self.source_tokens else 1.0


@dataclass(frozen=True)
class StoreStats:
    """What a store holds.

    Attributes:
        passages: how many, over all makers.
        nbytes: bytes of their slots as stored.
        makers: the same by who made them for whom.
        info: further facts of the kind of store.
    """

    passages: int
    nbytes: int
    makers: tuple[MakerStats, ...]
    info: Mapping[str, Any] = field(default_factory=dict)


class PassageStore(ABC):
    """Compressed passages under their keys. Safe to share by threads.

    Attributes:
        read_only: whether `put_many` is refused.
        name: says which store this is; another content under the same path has another name.
    """

    read_only: bool = False
    name: str

    @abstractmethod
    def get_many(self, keys: Sequence[PassageKey]) -> list[CompressedPassage | None]:
        """The passages under the keys, in order; ``None`` where there is none.

        Tensors are on the CPU and may be views of the store's own memory: do not write into them.

        Raises:
            StoreError: if a stored passage is damaged, or the store cannot be read.
        """

    @abstractmethod
    def put_many(self, entries: Sequence[Entry]) -> None:
        """Keeps entries; those whose key is stored already are left as they are. When it returns, they are safe.

        Raises:
            ValueError: if an entry does not fit its key (see `Entry.check`); then none was stored.
            StoreError: if they cannot be written; then the store is as it was before.
        """

    @abstractmethod
    def missing(self, keys: Iterable[PassageKey]) -> list[PassageKey]:
        """The distinct keys under which nothing is stored, in order."""

    @abstractmethod
    def entries(self, maker: Maker | None = None) -> Iterator[Entry]:
        """All entries (of one maker), one at a time, in no particular order."""

    @property
    @abstractmethod
    def stats(self) -> StoreStats:
        """What the store holds, counted now."""

    def close(self) -> None:  # noqa: B027 (a store may have nothing to let go of)
        """Lets go of files and memory; what was put stays safe."""

    def __contains__(self, key: PassageKey) -> bool:
        return not self.missing([key])

    def __enter__(self) -> PassageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sha256(text: str) -> str:
    """SHA-256 of a text's UTF-8, lone surrogates included, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def count_makers(rows: Iterable[tuple[Maker, str, int, int, int]]) -> tuple[MakerStats, ...]:
    """Sums (maker, interface, slots, source tokens, bytes) up, the largest maker first."""
    sums: dict[tuple[Maker, str], list[int]] = {}
    for maker, interface, *numbers in rows:
        total = sums.setdefault((maker, interface), [0, 0, 0, 0])
        for i, number in enumerate((1, *numbers)):
            total[i] += number
    found = (MakerStats(maker, interface, *total) for (maker, interface), total in sums.items())
    return tuple(sorted(found, key=lambda made: -made.passages))
