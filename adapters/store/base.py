"""Keys, entries and the interface of all stores of compressed passages."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from ...compressors import CompressedPassage, Compressor

ItemT = TypeVar("ItemT")


# Names in ``about`` that are the store's own: the facts of further documents that hold the text, and a text that Arrow lacks.
_ALSO, TEXT = "nutgraf:also", "nutgraf:text"
_DOCUMENT = ("ref_doc_id", "file")  # the facts that name a document: LlamaIndex's, a corpus'
# LlamaIndex gives a document without an id a random one, another one at each ingestion.
_RANDOM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class StoreError(RuntimeError):
    """A store cannot be read or written: full or read-only disk, missing or damaged file.

    Not a ``ValueError``, because LlamaIndex's refine and compact modes swallow those and answer "Empty Response".
    """


class Maker(NamedTuple):
    """Fingerprints of a passage's compressor and reader, and the requested ratio."""

    compressor: str
    reader: str | None
    ratio: float | None

    @classmethod
    def of(cls, compressor: Compressor, ratio: float | None = None) -> Maker:
        """Return the maker of a compressor's passages."""
        return cls(compressor.fingerprint, compressor.reader.fingerprint, None if ratio is None else float(ratio))


@dataclass(frozen=True)
class PassageKey:
    """Identity of a compressed passage, for stores and caches: everything that its content depends on.

    Attributes:
        text: SHA-256 of the text, 64 hexadecimal digits.
        compressor: the compressor's fingerprint.
        reader: the fingerprint of the reader it is for; ``None``: any reader.
        ratio: the requested compression ratio L / l; ``None``: the compressor's own.
        query: SHA-256 of the question, for a query-aware compressor.
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
        """Make the key of a text and, if any, a question."""
        ratio = None if ratio is None else float(ratio)
        return cls(sha256(text), compressor, reader, ratio, None if query is None else sha256(query))

    @property
    def maker(self) -> Maker:
        """The maker of the passage."""
        return Maker(self.compressor, self.reader, self.ratio)

    @cached_property
    def id(self) -> str:
        """Hash of the key, 32 hexadecimal digits; the same on every machine."""
        parts = json.dumps([self.text, self.compressor, self.reader, self.ratio, self.query])
        return hashlib.sha256(parts.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Facts:
    """What a store keeps of a passage besides its slots: text, retrieval vector, the caller's facts. ``None``: not given.

    A text of several documents (facts ``ref_doc_id`` or ``file``) is stored once, with the facts of each; see `documents`.

    Raises:
        ValueError: if a fact has one of the store's own names.
    """

    text: str | None = None
    vector: Sequence[float] | None = None
    about: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # As a store gives them back, so that equal facts compare equal.
        if self.vector is not None:
            object.__setattr__(self, "vector", tuple(array("f", self.vector)))
        about = json.loads(json.dumps(dict(self.about))) if self.about else None
        also = [] if about is None else about.get(_ALSO, [])
        if about and (TEXT in about or not isinstance(also, list) or not all(isinstance(one, dict) for one in also)):
            raise ValueError(f"A fact must not be named {_ALSO!r} or {TEXT!r}, which are the store's own; rename it.")
        object.__setattr__(self, "about", about)

    def over(self, older: Facts) -> Facts:
        """Return these facts, completed by older ones and by those of other documents."""
        ours, theirs = documents(self.about), documents(older.about)
        known = all(one in theirs for one in ours)  # documents that are ingested in turn change nothing
        return Facts(
            older.text if self.text is None else self.text,
            older.vector if self.vector is None else self.vector,
            older.about if known else joined([*ours, *theirs]),
        )

    def check(self, key: PassageKey) -> Facts:
        """Return themselves. Raises ``ValueError`` if the text is not the key's, or a number is NaN or infinite."""
        if self.text is not None and sha256(self.text) != key.text:
            raise ValueError("The entry's text is not the one that its key was made of.")
        if self.vector is not None and not all(map(math.isfinite, self.vector)):
            raise ValueError("The entry's retrieval vector holds NaN or infinite numbers; embed the text again.")
        return self


@dataclass(frozen=True, eq=False)
class Entry:
    """A stored passage.

    Attributes:
        key: its key.
        passage: the compressed passage.
        text: the original text, for retrieval, citations and recompression; ``None``: not kept.
        vector: its retrieval vector.
        about: JSON-able facts from the caller (document name, id).
    """

    key: PassageKey
    passage: CompressedPassage
    text: str | None = None
    vector: Sequence[float] | None = None
    about: Mapping[str, Any] | None = None

    def check(self) -> Entry:
        """Return itself.

        Raises:
            ValueError: if key, passage and text do not match, or a number is NaN or infinite.
        """
        key, passage = self.key, self.passage
        if passage.compressor != key.compressor:
            raise ValueError(
                f"The passage was made by the compressor {passage.compressor}, but its key names {key.compressor}; "
                "make the key with keys_for(compressor, texts)."
            )
        if passage.reader is not None and passage.reader != key.reader:
            raise ValueError(f"The passage was made for the reader {passage.reader}, but its key names {key.reader}.")
        self.facts.check(key)
        passage.check()
        return self

    @property
    def facts(self) -> Facts:
        """What is stored besides the slots."""
        return Facts(self.text, self.vector, self.about)

    def with_facts(self, facts: Facts) -> Entry:
        """Return a copy with other facts."""
        return replace(self, text=facts.text, vector=facts.vector, about=facts.about)


class Listed(NamedTuple):
    """A stored passage without its slots: what a listing shows. ``nbytes``: bytes of the slots as stored."""

    key: PassageKey
    interface: str
    source_tokens: int
    slots: int
    nbytes: int
    about: Mapping[str, Any] | None = None


def documents(about: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The facts of each document that holds a passage, the newest one's first."""
    if not about:
        return []
    return [{name: value for name, value in about.items() if name != _ALSO}, *about.get(_ALSO, ())]


def joined(newest_first: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The facts of several documents as one: of each document those that come first. Without a document only the first stay."""
    found: dict[str, Mapping[str, Any]] = {}
    for number, about in enumerate(newest_first):
        named = _document(about)
        if named or number == 0:
            found.setdefault(named, about)
    first, *rest = [dict(about) for about in found.values()] or [{}]
    return (first | {_ALSO: rest} if rest else first) or None


def _document(about: Mapping[str, Any]) -> str:
    """Name the document by its id, or by all other facts if the id is a random one; "" without a document."""
    name = next((name for name in _DOCUMENT if about.get(name) is not None), None)
    if name is None:
        return ""
    if not _RANDOM.fullmatch(str(about[name])):
        return f"{name}={about[name]}"
    return json.dumps({key: about[key] for key in about if key not in (name, "node_id")}, sort_keys=True)


class Hit(NamedTuple):
    """An entry that a search found, and its distance from the vector searched for (squared L2)."""

    entry: Entry
    distance: float


@dataclass(frozen=True)
class MakerStats:
    """Totals of one `Maker` in a store: passages, slots, source tokens and stored bytes."""

    maker: Maker
    interface: str
    passages: int
    slots: int
    source_tokens: int
    nbytes: int

    @property
    def ratio(self) -> float:
        """Compression ratio L / l over all passages; infinite if no slot is left."""
        if self.slots:
            return self.source_tokens / self.slots
        return math.inf if self.source_tokens else 1.0


@dataclass(frozen=True)
class StoreStats:
    """Totals of a store.

    Attributes:
        passages: number of passages.
        nbytes: bytes of their slots as stored.
        makers: totals per maker, the largest first.
        info: further facts of the kind of store.
    """

    passages: int
    nbytes: int
    makers: tuple[MakerStats, ...]
    info: Mapping[str, Any] = field(default_factory=dict)


class PassageStore(ABC):
    """Compressed passages by key. Thread-safe.

    Attributes:
        read_only: whether `put_many` is refused.
        name: identifies the store and its content: a new store in the same place has another name.
    """

    read_only: bool = False
    name: str

    @abstractmethod
    def get_many(self, keys: Sequence[PassageKey]) -> list[CompressedPassage | None]:
        """Return the passages under the keys, in order; ``None`` for missing ones.

        Tensors are on the CPU and may be views of the store's memory: do not write into them.

        Raises:
            StoreError: if a stored passage is damaged, or the store cannot be read.
        """

    @abstractmethod
    def put_many(self, entries: Sequence[Entry]) -> None:
        """Store entries. Of a stored key the slots stay, and the facts given replace those stored. Durable on return.

        Raises:
            ValueError: if an entry does not match its key (see `Entry.check`); then none was stored.
            StoreError: if they cannot be written; then the store is unchanged.
        """

    @abstractmethod
    def missing(self, keys: Iterable[PassageKey]) -> list[PassageKey]:
        """Return the distinct keys that are not stored, in order."""

    @abstractmethod
    def facts(self, keys: Iterable[PassageKey]) -> dict[PassageKey, Facts]:
        """Return what is stored besides the slots, for the stored ones of the keys."""

    @abstractmethod
    def _replace_facts(self, facts: Mapping[PassageKey, Facts]) -> None:
        """Overwrite the facts of stored keys."""

    @abstractmethod
    def ids(self, after: str = "", limit: int = 100) -> list[str]:
        """Return the ids (`PassageKey.id`) of up to ``limit`` passages that follow the id ``after``, sorted."""

    @abstractmethod
    def listed(self, ids: Iterable[str]) -> dict[str, Listed]:
        """Return the stored ones of the passages under these ids, without their slots."""

    @abstractmethod
    def delete(self, keys: Iterable[PassageKey]) -> int:
        """Delete the passages under the keys; return how many were stored.

        Raises:
            StoreError: if the store cannot be written.
        """

    def describe(self, facts: Mapping[PassageKey, Facts], *, keep: bool = False) -> int:
        """Bring the facts of stored passages up to date; return how many changed. Keys that are not stored are skipped.

        Args:
            facts: what is known now; ``None`` in it changes nothing.
            keep: only add what is missing.

        Raises:
            ValueError: if a text is not its key's, or a vector has another size or NaN.
            StoreError: if the store cannot be written.
        """
        changed = {}
        for key, old in self.facts(facts).items():
            new = old.over(facts[key]) if keep else facts[key].over(old)
            if new != old:
                changed[key] = new.check(key)
        if changed:
            self._replace_facts(changed)
        return len(changed)

    @abstractmethod
    def entries(self, maker: Maker | None = None) -> Iterator[Entry]:
        """Yield all entries (of one maker), in no particular order."""

    @property
    @abstractmethod
    def stats(self) -> StoreStats:
        """Totals, counted now."""

    def close(self) -> None:  # noqa: B027 (a store may have nothing to release)
        """Release files and memory."""

    def __contains__(self, key: PassageKey) -> bool:
        return not self.missing([key])

    def __enter__(self) -> PassageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8 (lone surrogates pass), 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def merged(entries: Iterable[Entry]) -> dict[PassageKey, Entry]:
    """Check entries and join those of one key: the first one's passage, the newest facts."""
    found: dict[PassageKey, Entry] = {}
    for entry in entries:
        entry.check()
        before = found.get(entry.key)
        found[entry.key] = entry if before is None else before.with_facts(entry.facts.over(before.facts))
    return found


def batched(items: Iterable[ItemT], size: int, weigh: Callable[[ItemT], int] = lambda item: 1) -> Iterator[list[ItemT]]:
    """Yield lists of items in order, each complete when its weights sum to ``size``."""
    batch: list[ItemT] = []
    total = 0
    for item in items:
        batch.append(item)
        total += weigh(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
