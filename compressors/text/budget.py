"""The most valuable units of a text within an exact budget of the reader's tokens."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Generator, Sequence
from itertools import accumulate

Span = tuple[int, int]
Search = Generator[list[str], list[int], tuple[tuple[Span, ...], int]]
_POOR = 3  # interpolations that hardly narrow the search, before a step that halves it
_SLACK = 256  # of so many tokens of a budget, one may stay unused
_TRIES = 16  # units tried for what room is left in the end


def merge(text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Joins spans that touch and trims white space off their ends; in order, blank ones left out."""
    merged: list[list[int]] = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1][1] = max(b, merged[-1][1])
        else:
            merged.append([a, b])
    return tuple(span for a, b in merged if (span := _trimmed(text, a, b)))


def merge_units(text: str, units: Sequence[Span], chosen: Sequence[int]) -> tuple[Span, ...]:
    """`merge` for some units of a partition of the text, by their indices."""
    spans: list[Span] = []
    last = -1
    for i in sorted(chosen):
        if i == last + 1 and spans:
            spans[-1] = (spans[-1][0], units[i][1])
        else:
            spans.append(units[i])
        last = i
    return tuple(span for a, b in spans if (span := _trimmed(text, a, b)))


def _trimmed(text: str, a: int, b: int) -> Span | None:
    piece = text[a:b]
    a, b = b - len(piece.lstrip()), a + len(piece.rstrip())
    return (a, b) if a < b else None


def join(text: str, spans: Sequence[Span], joiner: str = " ") -> str:
    """The shorter text: the spans' characters with the joiner between them."""
    return joiner.join(text[a:b] for a, b in spans)


def search(
    text: str,
    units: Sequence[Span],
    order: Sequence[int],
    target: int,
    whole: int,
    sizes: Sequence[float],
    joiner: str = " ",
    first: int = 0,
) -> Search:
    """Takes units in order of value until the budget is spent.

    The budget holds for the tokens of the joined result, not for the sum over the units. The longest run of units from the
    front of the order that fits is found by interpolation; some later, shorter units then use what room is left. Of a
    budget of 256 tokens and more, one in 256 may stay unused: recounting a long text for it costs more than it tells.

    This is a generator, so that the searches of many texts can have their tokens counted together (`run_searches`): it
    yields lists of texts, is sent their numbers of tokens, and returns kept spans, in order, whose `join` has at most
    ``target`` tokens, with that number; maybe none, and 0.

    Args:
        text: the text.
        units: a partition of the text.
        order: indices into ``units``, the most valuable first.
        target: tokens that the result may have.
        whole: tokens of the text.
        sizes: about how many tokens each unit has; only their proportions matter.
        joiner: what is put between spans that do not touch.
        first: units at the front of the order that must stay as long as they fit; among those one that does not fit does
            not end the search.
    """
    if target < 1:
        return (), 0

    def kept(chosen: Sequence[int]) -> str:
        return join(text, merge_units(text, units, chosen), joiner)

    alone = (yield [kept([i]) for i in order[:first]]) if first else []
    must = [i for i, n in zip(order[:first], alone) if n <= target]
    ranked = [*must, *order[first:]]
    upto = list(accumulate((sizes[i] for i in ranked), initial=0.0))
    low, high = 0, len(ranked) + 1  # how many units are known to fit, and how many not to
    below, above = 0, whole
    poor = 0  # steps in a row that left more than half of what was in question
    slack = target // _SLACK
    while high - low > 1 and below + slack < target:
        share = min(max((target - below) / max(above - below, 1), 0.0), 1.0)
        aim = upto[low] + share * (upto[min(high, len(ranked))] - upto[low])
        k = (low + high) // 2 if poor > _POOR else min(max(bisect(upto, aim) - 1, low + 1), high - 1)
        (n,) = yield [kept(ranked[:k])]
        before = high - low
        if n <= target:
            low, below = k, n
        else:
            high, above = k, n
        poor = poor + 1 if 2 * (high - low) > before and poor <= _POOR else 0
    chosen = list(ranked[:low])
    room = target - below - slack
    # Recounting a long text is dear, and there the room that is left matters little.
    tries = len(must) + max(1, min(_TRIES, _TRIES * 10_000 // len(text)))
    for i in ranked[low:]:
        if room < 1 or tries < 1:
            break
        if (units[i][1] - units[i][0]) * whole > (2 * room + 2) * len(text):
            continue  # too long, judged by the text's characters a token
        tries -= 1
        (n,) = yield [kept([*chosen, i])]
        if n <= target:
            chosen.append(i)
            below, room = n, target - n - slack
    return merge_units(text, units, chosen), below


def run_searches(
    searches: Sequence[Search], count: Callable[[list[str]], list[int]]
) -> list[tuple[tuple[Span, ...], int]]:
    """Runs searches side by side, so that every round of them is one call of ``count``.

    Args:
        searches: generators such as `search`.
        count: tokens of each of some texts.

    Returns:
        What each search returns.
    """
    found: list[tuple[tuple[Span, ...], int]] = [((), 0)] * len(searches)
    answers: dict[int, list[int] | None] = dict.fromkeys(range(len(searches)))
    while answers:
        asked: dict[int, list[str]] = {}
        for i, answer in answers.items():
            try:
                asked[i] = next(searches[i]) if answer is None else searches[i].send(answer)
            except StopIteration as stop:
                found[i] = stop.value
        counts = iter(count([text for texts in asked.values() for text in texts]) if asked else [])
        answers = {i: [next(counts) for _ in texts] for i, texts in asked.items()}
    return found
