"""Filling a store: compress what is not stored yet, batch by batch, so that a stop loses one batch at most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from ...compressors import CompressedPassage, Compressor, FidelityGate
from .base import Entry, Maker, PassageKey, PassageStore, StoreError

_log = logging.getLogger(__name__)
BATCH = 64  # passages compressed and stored at a time


@dataclass(frozen=True)
class Filled:
    """What `fill` did.

    Attributes:
        found: distinct passages that were stored before.
        compressed: those compressed now.
        source_tokens: reader tokens of the texts compressed now.
        slots: reader positions that these take.
    """

    found: int = 0
    compressed: int = 0
    source_tokens: int = 0
    slots: int = 0

    def __add__(self, other: Filled) -> Filled:
        return Filled(*(a + b for a, b in zip(astuple(self), astuple(other))))


def keys_for(
    compressor: Compressor,
    texts: Sequence[str],
    *,
    ratio: float | None = None,
    query: str | None = None,
) -> list[PassageKey]:
    """The keys under which a compressor's passages are stored, one a text, in order."""
    made_by = compressor.fingerprint
    reader = compressor.reader.fingerprint
    return [PassageKey.of(text, compressor=made_by, reader=reader, ratio=ratio, query=query) for text in texts]


def fill(
    store: PassageStore,
    compressor: Compressor,
    texts: Sequence[str],
    *,
    ratio: float | None = None,
    vectors: Sequence[Sequence[float] | None] | None = None,
    reuse_vectors: bool = False,
    abouts: Sequence[Mapping[str, Any] | None] | None = None,
    gate: FidelityGate | None = None,
    batch_size: int | None = None,
    done: Callable[[int], None] | None = None,
) -> Filled:
    """Compresses those of the texts that are not stored and stores them, a batch at a time.

    Run again after a stop, it goes on where it was: what was stored is skipped.

    Args:
        store: where they go.
        compressor: compresses them.
        texts: the passages; a text that comes twice is compressed once.
        ratio: compression ratio L / l in place of the compressor's own.
        vectors: retrieval vectors (or ``None``), one a text, to be stored beside them.
        reuse_vectors: give the vectors to the compressor too, which must take those of its own embedder (xRAG).
        abouts: JSON-able facts to be stored beside them, one (or ``None``) a text.
        gate: measures what survived of each passage compressed now, which is stored with it; what was stored before
            without a gate stays as it is and is measured when it is read.
        batch_size: passages compressed and stored at a time; default 64.
        done: is told the number of texts dealt with, after each batch.

    Returns:
        How many distinct passages there were and how many were compressed.

    Raises:
        ValueError: if the lists do not have one entry a text, or ``batch_size`` is not positive.
        StoreError: if the store cannot be read or written.
    """
    for name, given in (("vectors", vectors), ("abouts", abouts)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{name} must hold one entry a text: got {len(given)} for {len(texts)} texts.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    keys = keys_for(compressor, texts, ratio=ratio)
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    wanted = sorted(first[key] for key in store.missing(keys))
    _tell(done, len(texts) - len(wanted))
    filled = Filled(found=len(first) - len(wanted))
    for places in _batches(wanted, batch_size or BATCH):
        given = [vectors[i] for i in places] if vectors is not None and reuse_vectors else None
        passages = compressor.compress(
            [texts[i] for i in places],
            ratio=ratio,
            vectors=given if given and any(vector is not None for vector in given) else None,
        )
        if gate is not None:
            passages = gate.mark(passages, [texts[i] for i in places])
        store.put_many(
            [
                Entry(
                    keys[i],
                    passage,
                    texts[i],
                    None if vectors is None else vectors[i],
                    None if abouts is None else abouts[i],
                )
                for i, passage in zip(places, passages, strict=True)
            ]
        )
        _tell(done, len(places))
        sizes = (sum(p.source_tokens for p in passages), sum(p.slots for p in passages))
        filled += Filled(0, len(places), *sizes)
    return filled


def get_or_compress(
    store: PassageStore,
    keys: Sequence[PassageKey],
    texts: Sequence[str],
    compress: Callable[[list[int]], Sequence[CompressedPassage]],
) -> tuple[list[CompressedPassage], list[int]]:
    """The passages under the keys; those that are not there are compressed together and, unless it is read-only, stored.

    A store that can be read but not written costs an answer nothing but a warning in the log.

    Args:
        store: where they are looked up.
        keys, texts: one a passage, in order.
        compress: given the places of what is missing, returns one compressed passage for each.

    Returns:
        The passages in order, and the places that were compressed.
    """
    found = list(store.get_many(keys))
    wanted = [place for place, passage in enumerate(found) if passage is None]
    if wanted:
        made = compress(wanted)
        for place, passage in zip(wanted, made, strict=True):
            found[place] = passage
        if not store.read_only:
            try:
                store.put_many([Entry(keys[place], passage, texts[place]) for place, passage in zip(wanted, made)])
            except StoreError as error:
                _log.warning("The answer goes on, but its passages could not be stored: %s", error)
    return [passage for passage in found if passage is not None], wanted


def explain_missing(store: PassageStore, maker: Maker) -> str:
    """Why a store may lack what was asked of it: a changed compressor, reader or ratio; the end of a sentence."""
    others = [made.maker for made in store.stats.makers if made.maker != maker]
    if not others:
        return "."
    names = ("compressor", "reader", "ratio")
    changed = [name for i, name in enumerate(names) if maker[i] not in {other[i] for other in others}]
    what = " and ".join(changed) or "combination of compressor, reader and ratio"
    return f"; it holds passages of another {what}: was it changed since the passages were indexed?"


def _batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _tell(done: Callable[[int], None] | None, number: int) -> None:
    if done is not None and number:
        done(number)
