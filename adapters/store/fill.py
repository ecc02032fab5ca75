"""Fill a store: compress what is not stored yet, batch by batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from ...compressors import CompressedPassage, Compressor, FidelityGate
from ...compressors.core.textfiles import check_strings
from .base import Entry, Facts, Maker, PassageKey, PassageStore, StoreError, batched

_log = logging.getLogger(__name__)
BATCH = 64
_DESCRIBED = 1000  # stored passages compared at a time


@dataclass(frozen=True)
class Filled:
    """Result of `fill`.

    Attributes:
        found: distinct passages stored before.
        compressed: passages compressed now.
        source_tokens: reader tokens of the texts compressed now.
        slots: reader positions of the passages compressed now.
        updated: passages stored before whose vector, text or facts were brought up to date.
    """

    found: int = 0
    compressed: int = 0
    source_tokens: int = 0
    slots: int = 0
    updated: int = 0

    def __add__(self, other: Filled) -> Filled:
        return Filled(*(a + b for a, b in zip(astuple(self), astuple(other))))


def keys_for(
    compressor: Compressor,
    texts: Sequence[str],
    *,
    ratio: float | None = None,
    query: str | None = None,
) -> list[PassageKey]:
    """Return the keys of a compressor's passages, one per text."""
    maker = Maker.of(compressor, ratio)
    return [PassageKey.of(text, **maker._asdict(), query=query) for text in check_strings("texts", texts, "passages")]


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
    """Compress and store the texts that are not stored, a batch at a time. After a stop, run it again to continue.

    Passages stored already are not compressed again; their vectors and facts are replaced by those given.

    Args:
        store: where the passages go.
        compressor: compresses them.
        texts: the passages; a repeated text is compressed once.
        ratio: compression ratio L / l; default: the compressor's own.
        vectors: retrieval vectors (or ``None``) to store, one per text.
        reuse_vectors: pass the vectors to the compressor, which must take those of its own embedder (xRAG); a passage
            stored with another vector is compressed again.
        abouts: JSON-able facts (or ``None``) to store, one per text.
        gate: measures what survived of each passage compressed now; stored with it. Passages stored without a gate are
            measured when they are read.
        batch_size: passages compressed and stored at a time; default 64.
        done: called with the number of texts finished, after each batch.

    Raises:
        TypeError: if ``texts`` is one string.
        ValueError: if a list does not have one entry per text, or ``batch_size`` is below 1.
        StoreError: if the store cannot be read or written.
    """
    texts = check_strings("texts", texts, "passages")
    for name, sized in (("vectors", vectors), ("abouts", abouts)):
        if sized is not None and len(sized) != len(texts):
            raise ValueError(f"{name} must have one entry per text: got {len(sized)} for {len(texts)} texts.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    keys = keys_for(compressor, texts, ratio=ratio)
    facts: dict[PassageKey, Facts] = {}
    for i, (key, text) in enumerate(zip(keys, texts)):
        own = Facts(text, None if vectors is None else vectors[i], None if abouts is None else abouts[i])
        facts[key] = own.over(facts[key]) if key in facts else own
    missing = store.missing(facts)
    stored = {key: facts[key] for key in facts.keys() - set(missing)}
    updated = 0
    for some in batched(stored, _DESCRIBED):
        if reuse_vectors:
            missing += (changed := _of_another_vector(store, {key: stored[key] for key in some}))
            store.delete(changed)
        updated += store.describe({key: stored[key] for key in some})
    tell = done or (lambda number: None)
    if len(texts) > len(missing):
        tell(len(texts) - len(missing))
    filled = Filled(found=len(facts) - len(missing), updated=updated)
    for batch in batched(missing, batch_size or BATCH):
        given = [facts[key].vector if reuse_vectors else None for key in batch]
        sources = [facts[key].text or "" for key in batch]
        passages = compressor.compress(
            sources, ratio=ratio, vectors=given if any(vector is not None for vector in given) else None
        )
        if gate is not None:
            passages = gate.mark(passages, sources)
        store.put_many([Entry(key, passage, **vars(facts[key])) for key, passage in zip(batch, passages, strict=True)])
        tell(len(batch))
        sizes = (sum(p.source_tokens for p in passages), sum(p.slots for p in passages))
        filled += Filled(0, len(batch), *sizes)
    return filled


def _of_another_vector(store: PassageStore, facts: Mapping[PassageKey, Facts]) -> list[PassageKey]:
    """Keys of passages stored with a vector unlike the one given; their slots may be of that vector."""
    found = []
    for key, old in store.facts(facts).items():
        new = facts[key].vector
        if old.vector is not None and new is not None and not _close(old.vector, new):
            found.append(key)
    return found


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and math.dist(a, b) <= 1e-3 * math.hypot(*a, 1e-6)  # an embedder's batches differ a little


def get_or_compress(
    store: PassageStore,
    keys: Sequence[PassageKey],
    texts: Sequence[str],
    compress: Callable[[list[int]], Sequence[CompressedPassage]],
) -> tuple[list[CompressedPassage], list[int]]:
    """Return the passages under the keys; compress the missing ones together and store them unless it is read-only.

    A store that cannot be written costs a warning in the log, not the answer.

    Args:
        store: where to look.
        keys, texts: one per passage, in order.
        compress: takes the places of the missing passages and returns one compressed passage each.

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
                _log.warning("Passages were compressed but could not be stored: %s", error)
    return [passage for passage in found if passage is not None], wanted


def explain_missing(store: PassageStore, maker: Maker) -> str:
    """Explain why a store lacks a maker's passages, as the end of a sentence."""
    others = [made.maker for made in store.stats.makers if made.maker != maker]
    if not others:
        return "."
    names = ("compressor", "reader", "ratio")
    changed = [name for i, name in enumerate(names) if maker[i] not in {other[i] for other in others}]
    what = " and ".join(changed) or "combination of compressor, reader and ratio"
    return f"; it holds passages of another {what}: was it changed since the passages were indexed?"
