"""What is audited: compressed passages at some ratio, the passages of a store, or retrieval vectors, with their originals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...adapters.store import Entry, Maker, PassageStore
from ...compressors import Compressor, Reader, ReaderMismatchError
from ...compressors.encoders.embedder import Embedder
from ...recipes.tasks.inversion import Stolen
from .scores import words

PAGE = 4096  # passages of a store that are looked at together
LEAKED = 1000  # most pairs of text and vector that an attacker has, see `Target.leaked`


@dataclass
class Target:
    """Stored passages and the texts that they were made of.

    Attributes:
        name: the method, or the embedder of the vectors.
        ratio: compression ratio asked for, if any.
        interface: `embeds`, `kv`, `text` or `vector`.
        texts, stolen: paired.
        victim: what made them, if it is at hand; `made_by` is its fingerprint.
        leaked: other texts with what is stored of them, which an attacker may have got hold of.
        defence: what was done to `stolen` and `leaked`, see `nutgraf.benchmarks.audit.defences`.
    """

    name: str
    ratio: float | None
    interface: str
    texts: list[str]
    stolen: list[Stolen]
    victim: Compressor | Embedder | None = None
    made_by: str = ""
    leaked: list[tuple[str, Stolen]] = field(default_factory=list, repr=False)
    defence: str | None = None

    def __post_init__(self) -> None:
        if self.victim is not None:
            self.made_by = self.victim.fingerprint

    @property
    def label(self) -> str:
        """Name with the ratio and the defence."""
        return self.name + (f" {self.ratio:g}x" if self.ratio else "") + (f", {self.defence}" if self.defence else "")

    @property
    def slots(self) -> float | None:
        """Mean slots of a passage; None for vectors."""
        return None if self.interface == "vector" else _mean([one.slots for one in self.stolen])  # type: ignore[union-attr]

    @property
    def nbytes(self) -> float:
        """Mean bytes of a passage."""
        return _mean([one.nbytes for one in self.stolen])


def compressed(
    compressor: Compressor, ratios: Sequence[float | None], texts: Sequence[str], name: str = ""
) -> list[Target]:
    """The passages of a compressor at several ratios. `name`: of the compressor; default its method's."""
    made = compressor.compress_at(list(texts), list(ratios), batch_size=32)
    name, interface = name or compressor.config.method, compressor.interface
    return [Target(name, ratio, interface, list(texts), list(found), compressor) for ratio, found in zip(ratios, made)]


def vectors(embedder: Embedder, texts: Sequence[str]) -> Target:
    """The retrieval vectors of texts, one per shard that the embedder reads whole."""
    shards = embedder.embed_shards(texts, embedder.max_tokens, [1] * len(texts))
    return Target(embedder.name, None, "vector", list(texts), list(shards), embedder)


def steal(target: Target, texts: Sequence[str]) -> list[Stolen]:
    """What would be stored of other texts. Raises ValueError if it is not known what made the target."""
    if isinstance(target.victim, Compressor):
        return list(target.victim.compress(list(texts), ratio=target.ratio, batch_size=32))
    if target.victim is None:
        raise ValueError(f"It is not known what made {target.label}; audit its compressor.")
    return list(target.victim.embed_shards(texts, target.victim.max_tokens, [1] * len(texts)))


def stored(store: PassageStore, reader: Reader, limit: int | None = None) -> list[Target]:
    """The passages of a store, one target per compressor and ratio, and one for the retrieval vectors.

    Only the passages that are attacked are read, so that a store may be larger than memory.

    Args:
        store: holds passages with their texts, which the attack is compared with.
        reader: the reader that they were compressed for.
        limit: at most so many passages of each, the first by their ids. An id is a hash, so they are a random sample, and the
            same one in every run.

    Raises:
        ReaderMismatchError: if a passage was made for another reader.
        ValueError: if the store holds no passage with a text.
    """
    vectors: dict[str, Sequence[float]] = {}  # by text
    left = {
        (one.maker, one.interface): one.passages if limit is None else min(limit, one.passages)
        for one in store.stats.makers
    }
    groups: dict[tuple[str, Maker, str], list[Entry]] = {}
    after = ""
    while any(left.values()) and (ids := store.ids(after, PAGE)):
        after = ids[-1]
        for entry in _first_with_text(store, ids, left, vectors):
            if entry.passage.reader not in (None, reader.fingerprint):
                raise ReaderMismatchError(
                    f"The store holds passages for the reader {entry.passage.reader}, but {reader.name!r} is "
                    f"{reader.fingerprint}; name the store's reader with --reader."
                )
            name = str(entry.passage.info.get("method", entry.passage.compressor))
            groups.setdefault((name, entry.key.maker, entry.passage.interface), []).append(entry)
    if not groups:
        raise ValueError(
            "The store holds no passage with its text, and an audit compares what it reads with the text; make a store with "
            "nutgraf compress, which keeps texts, or audit the compressor: --compressor NAME."
        )
    found = [
        Target(name, maker.ratio, interface, *_columns(entries), made_by=maker.compressor)
        for (name, maker, interface), entries in groups.items()
    ]
    attacked = {
        entry.text: entry.vector for entries in groups.values() for entry in entries if entry.vector is not None
    }
    if some := list(attacked.items())[:limit]:
        rows: list[Stolen] = [torch.tensor(vector)[None] for _, vector in some]
        others = [text for text in vectors if text not in attacked][:LEAKED]
        leaked: list[tuple[str, Stolen]] = [(text, torch.tensor(vectors[text])[None]) for text in others]
        found.append(Target("vectors", None, "vector", [text or "" for text, _ in some], rows, leaked=leaked))
    return found


def _first_with_text(
    store: PassageStore,
    ids: Sequence[str],
    left: dict[tuple[Maker, str], int],
    vectors: dict[str, Sequence[float]],
) -> list[Entry]:
    """The first passages under the ids that have a text, as many of each kind as are `left`, which is counted down.

    Retrieval vectors go into `vectors`, those of passages that are not read, too.
    """
    listed = store.listed(ids)
    kinds = {one.key: (one.key.maker, one.interface) for name in ids if (one := listed.get(name)) is not None}
    facts = store.facts([key for key, kind in kinds.items() if left.get(kind)])
    chosen = []
    for key in (key for key in kinds if key in facts and words(facts[key].text or "")):
        if left[kinds[key]]:
            left[kinds[key]] -= 1
            chosen.append(key)
        if (vector := facts[key].vector) is not None and len(vectors) < 2 * LEAKED:
            vectors[facts[key].text or ""] = vector
    read = zip(chosen, store.get_many(chosen))
    return [Entry(key, passage, facts[key].text, facts[key].vector) for key, passage in read if passage is not None]


def _columns(entries: Sequence[Entry]) -> tuple[list[str], list[Stolen]]:
    return [entry.text or "" for entry in entries], [entry.passage for entry in entries]


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most `limit` of the items, evenly spread."""
    n = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)
