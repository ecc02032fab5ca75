"""Nested slots: some of a passage's slots, chosen in a fixed order, are themselves a good compression of all of it.

Matryoshka representations (arXiv 2205.13147) train the first k dimensions of a vector to be a good vector; here it is the
first k slots of a passage, as in Matryoshka's use over visual tokens (arXiv 2405.17430, 2405.20797), and k is drawn at random
while training. A store then holds the slots of the finest ratio and serves every coarser one without compressing again.

What each slot stands for decides how good a prefix can be. Cut into n even runs, every slot knows its own run alone: half of
the slots would be half of the passage. One window on everything, then two, four, ... (a binary tree) covers the passage with
every prefix, but spends half of the slots on windows that are twice as wide as they need be and the other half on wider
ones still. Here every doubling of the slots narrows the windows of half of the passage, in turns: ``base`` even runs come
first; the next as many slots take the second half of each run, with windows half as wide; the next twice as many the first
halves, with windows of a quarter; then the second halves again, with windows of an eighth. So at every doubling half of the
tokens have the narrowest window that so many even runs would give them, and the other half one twice as wide. Inside a
doubling the order is bit-reversed, so that a prefix that ends there is spread over the whole passage.

The slots stand in the order of the text, a wide window before those inside it, so that what the reader sees reads on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.config import added, check_ratio

MARK = "nested"  # of a passage's info: the segments as `[tokens, slots, base]` each, and how many slots are left


class NestedSlot(NamedTuple):
    """One slot: the tokens ``start`` to ``end`` that it stands for, and its place ``rank`` in the order of nesting."""

    start: int
    end: int
    rank: int


@dataclass(kw_only=True)
class NestedSettings:
    """Mixin of a compressor's config: whether its slots are nested."""

    nested: bool = added(
        False,
        "make the slots once, at the config's ratio, so that the first k of them in nested order are a compression too: any "
        "higher ratio is a part of them; train it on random ratios",
    )
    coarsest: float = added(
        32.0, "nested slots: the highest ratio at which every part of a passage still has a slot's window on it"
    )

    def check_nested(self) -> None:
        """Raises ``ValueError`` for values that no nesting can have."""
        if not isinstance(self.nested, bool):
            raise ValueError(f"nested must be true or false, got {self.nested!r}.")
        check_ratio(self.coarsest, "coarsest: source tokens per slot")
        if self.nested and (getattr(self, "fixed_slots", False) or getattr(self, "truncate", None) is not None):
            raise ValueError("Nested slots are proportional to the passage: leave fixed_slots and truncate out.")

    def nest_of(self, cut: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]] | None:
        """A passage's segments ``(tokens, slots)`` with their base; ``None`` without nesting."""
        return [(n, slots, base_slots(n, slots, self.coarsest)) for n, slots in cut] if self.nested else None


def base_slots(tokens: int, slots: int, coarsest: float) -> int:
    """How many even runs a segment's nesting begins with: ``slots`` halved until they are ``ceil(tokens / coarsest)``."""
    most = max(math.ceil(tokens / coarsest - 1e-6), 1)
    while slots > most:
        slots //= 2
    return slots


def nest(tokens: int, slots: int, base: int) -> list[NestedSlot]:
    """A segment's slots in the order of the text.

    Args:
        tokens: its length.
        slots: how many slots it has.
        base: what `base_slots` said.
    """
    totals = [slots]
    while totals[0] > base:
        totals.insert(0, totals[0] // 2)
    runs = _split(0, tokens, base)
    out = [NestedSlot(a, b, rank) for (a, b), rank in zip(runs, _spread_ranks(base))]
    for level, (before, after) in enumerate(zip(totals, totals[1:]), 1):
        windows: list[tuple[int, int]] = []
        for number, (a, b) in enumerate(runs):
            count = (number + 1) * (after - before) // base - number * (after - before) // base
            middle = (a + b) // 2
            half = (middle, b) if level % 2 or a == middle else (a, middle)
            windows += _split(*half, count)
        out += [NestedSlot(a, b, before + rank) for (a, b), rank in zip(windows, _spread_ranks(after - before))]
    return sorted(out, key=lambda slot: (slot.start, -slot.end, slot.rank))


def nest_passage(segments: Sequence[Sequence[int]]) -> list[NestedSlot]:
    """The slots of all segments ``(tokens, slots, base)`` of a passage: tokens counted and ranks merged over all of them.

    A prefix takes the same share of every segment's slots.
    """
    found: list[tuple[float, int, NestedSlot]] = []
    first = 0
    for number, (tokens, slots, base) in enumerate(segments):
        found += [
            (slot.rank / slots, number, NestedSlot(first + slot.start, first + slot.end, slot.rank))
            for slot in nest(tokens, slots, base)
        ]
        first += tokens
    order = sorted(range(len(found)), key=lambda i: (found[i][0], found[i][1]))
    rank = {i: place for place, i in enumerate(order)}
    return [slot._replace(rank=rank[i]) for i, (_, _, slot) in enumerate(found)]


def nested_slots(info: Mapping[str, Any]) -> list[NestedSlot] | None:
    """The slots that a passage with this info still has, in their order; ``None`` if its slots are not nested."""
    if not (mark := info.get(MARK)):
        return None
    return [slot for slot in nest_passage(mark["segments"]) if slot.rank < mark["slots"]]


def slots_at(source_tokens: int, ratio: float | None, finest: float | None) -> int | None:
    """Slots that a passage is cut to for a ratio, at least one; ``None``: none are cut.

    Raises:
        ValueError: for a ratio below the one that the slots are made at.
    """
    if ratio is None:
        return None
    if finest is not None and ratio < finest * (1 - 1e-9):
        raise ValueError(
            f"These nested slots are made at the ratio {finest:g} and cut to higher ones; {ratio:g} is finer. Ask for "
            f"{finest:g} or more, or train with a lower compressor.ratio."
        )
    return max(math.ceil(source_tokens / ratio - 1e-6), 1)


def _split(start: int, end: int, count: int) -> list[tuple[int, int]]:
    """``count`` even runs of the tokens from ``start`` to ``end``, of at least one token each."""
    length = end - start
    borders = [start + i * length // count for i in range(count + 1)] if count else []
    return [(a, max(b, a + 1)) for a, b in zip(borders, borders[1:])]


def _spread_ranks(count: int) -> list[int]:
    """The rank of each of ``count`` neighbours in bit-reversed order: 0, 2, 1, 3 for four of them."""
    bits = max(count - 1, 1).bit_length()
    order = sorted(range(count), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    ranks = [0] * count
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks
