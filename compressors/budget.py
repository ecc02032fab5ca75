"""The most valuable units of a text within an exact budget of the reader's tokens."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate

Span = tuple[int, int]
_TRIES = 16  # units tried for what room is left in the end


def merge(text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Joins spans that touch and trims white space off their ends; in order, blank ones left out."""
    merged: list[list[int]] = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1][1] = max(b, merged[-1][1])
        else:
            merged.append([a, b])
    trimmed = []
    for a, b in merged:
        piece = text[a:b]
        a, b = b - len(piece.lstrip()), a + len(piece.rstrip())
        if a < b:
            trimmed.append((a, b))
    return tuple(trimmed)


def join(text: str, spans: Sequence[Span], joiner: str = " ") -> str:
    """The shorter text: the spans' characters with the joiner between them."""
    return joiner.join(text[a:b] for a, b in spans)


def select(
    text: str,
    units: Sequence[Span],
    order: Sequence[int],
    target: int,
    count: Callable[[str], int],
    joiner: str = " ",
    first: int = 0,
) -> tuple[Span, ...]:
    """Takes units in order of value until the budget is spent.

    The budget holds for the tokens of the joined result, not for the sum over the units. The longest run of units from the
    front of the order that fits is found by interpolation; some later, shorter units then use what room is left.

    Args:
        text: the text.
        units: spans of characters.
        order: indices into ``units``, the most valuable first.
        target: tokens that the result may have.
        count: tokens of a text.
        joiner: what is put between spans that do not touch.
        first: units at the front of the order that must stay as long as they fit; among those one that does not fit does
            not end the search.

    Returns:
        Kept spans, in order, whose `join` has at most ``target`` tokens; maybe none.
    """
    if target < 1:
        return ()

    def cost(chosen: Sequence[int]) -> int:
        return count(join(text, merge(text, [units[i] for i in chosen]), joiner))

    must = [i for i in order[:first] if cost([i]) <= target]
    ranked = [*must, *order[first:]]
    characters = list(accumulate((units[i][1] - units[i][0] for i in ranked), initial=0))
    whole = max(1, count(text))
    low, high = 0, len(ranked) + 1  # how many units are known to fit, and how many not to
    below, above = 0, whole
    halve = False
    while high - low > 1 and below < target:
        share = 0.5 if halve else min(max((target - below) / max(above - below, 1), 0.0), 1.0)
        aim = characters[low] + share * (characters[min(high, len(ranked))] - characters[low])
        k = min(max(bisect(characters, aim) - 1, low + 1), high - 1)
        n = cost(ranked[:k])
        if n <= target:
            low, below = k, n
        else:
            high, above = k, n
        halve = not halve
    chosen = list(ranked[:low])
    room = target - below
    # Recounting a long text is dear, and there the room that is left matters little.
    tries = len(must) + max(1, min(_TRIES, _TRIES * 10_000 // len(text)))
    for i in ranked[low:]:
        if room < 1 or tries < 1:
            break
        if (units[i][1] - units[i][0]) * whole > (2 * room + 2) * len(text):
            continue  # too long, judged by the text's characters a token
        tries -= 1
        if (n := cost([*chosen, i])) <= target:
            chosen.append(i)
            room = target - n
    return merge(text, [units[i] for i in chosen])
