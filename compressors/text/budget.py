"""Exact token budgets: the most valuable units of a text that fit, and one budget divided between passages."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Generator, Sequence
from itertools import accumulate

from ..core.structure import Structure
from ..core.units import Span

Search = Generator[list[str], list[int], tuple[tuple[Span, ...], int]]
_POOR = 3  # interpolation steps that hardly narrow the search before one bisection step
_SLACK = 256  # one token in 256 of a budget may stay unused
_TRIES = 16  # units tried for the room that is left at the end


def merge(text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Joins touching spans, trims white space off their ends and drops blank ones."""
    merged: list[Span] = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    trimmed = ((b - len(text[a:b].lstrip()), a + len(text[a:b].rstrip())) for a, b in merged)
    return tuple((a, b) for a, b in trimmed if a < b)


def join(text: str, spans: Sequence[Span], joiner: str = " ", structure: Structure | None = None) -> str:
    """Joins the characters of the spans, in a structured text by its line breaks and commas."""
    return joiner.join(text[a:b] for a, b in spans) if structure is None else structure.join(spans, joiner)


def search(
    text: str,
    units: Sequence[Span],
    order: Sequence[int],
    target: int,
    whole: int,
    sizes: Sequence[float],
    joiner: str = " ",
    first: int = 0,
    structure: Structure | None = None,
    owners: Sequence[int] = (),
) -> Search:
    """Takes units by value until the budget is spent.

    The budget holds for the tokens of the joined result, not for the sum over units. Interpolation finds the longest run
    of units from the front of the order that fits; later, shorter units then fill the remaining room. From 256 tokens on,
    one token in 256 may stay unused, because recounting a long text costs more.

    A generator, so that `run_searches` can count the tokens of many texts together. It yields texts, is sent their token
    counts, and returns the kept spans in order with the token count of their `join`: at most ``target``, maybe none and 0.

    Args:
        text: the text.
        units: a partition of the text, or units of its structure.
        order: indices into ``units``, the most valuable first.
        target: maximal tokens of the result.
        whole: tokens of the text.
        sizes: approximate tokens of each unit; only their proportions matter.
        joiner: text between spans that do not touch.
        first: units at the front of the order that must stay; nothing is kept if they do not fit together.
        structure: the structure of the text, if it has one.
        owners: of each unit, the index of the part of the structure that it belongs to.
    """
    if target < 1:
        return (), 0

    def spans_of(chosen: Sequence[int]) -> tuple[Span, ...]:
        if structure is None:
            return merge(text, [units[i] for i in chosen])
        return structure.merge([(units[i], owners[i]) for i in chosen])

    def kept(chosen: Sequence[int]) -> str:
        return join(text, spans_of(chosen), joiner, structure)

    ranked = list(order)
    low, below = 0, 0
    if first:
        low = first
        (below,) = yield [kept(ranked[:first])]
        if below > target:
            return (), 0
    if structure is not None:
        # Rows and members differ in size, and bring others along: leave out those that can never fit.
        large = [i for i in ranked[first:] if 2 * (units[i][1] - units[i][0]) * whole > target * len(text)]
        counts = (yield [kept([i]) for i in large]) if large else []
        never = {i for i, n in zip(large, counts) if n > target}
        ranked = [i for i in ranked if i not in never]
    upto = list(accumulate((sizes[i] for i in ranked), initial=0.0))
    high, above = len(ranked) + 1, whole  # `low` units fit, `high` units do not
    poor = 0  # consecutive steps that left more than half of the interval
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
    # Recounting a long text is expensive, and the remaining room matters little there.
    tries = max(1, min(_TRIES, _TRIES * 10_000 // len(text)))
    for i in ranked[low:]:
        if room < 1 or tries < 1:
            break
        if (units[i][1] - units[i][0]) * whole > (2 * room + 2) * len(text):
            continue  # too long, by the text's characters per token
        tries -= 1
        (n,) = yield [kept([*chosen, i])]
        if n <= target:
            chosen.append(i)
            below, room = n, target - n - slack
    return spans_of(chosen), below


def run_searches(
    searches: Sequence[Search], count: Callable[[list[str]], list[int]]
) -> list[tuple[tuple[Span, ...], int]]:
    """Runs several `search` generators in lockstep, with one call of ``count`` (tokens of each text) per round."""
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


def kept_share(ratio: float) -> float:
    """Returns ``1 / ratio``, rounded so that ``1 / (1 / 0.9)`` is 0.9: published thresholds are whole percents."""
    return round(1 / ratio, 12)


def share_out(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Divides a budget in proportion to weights, with no share above its cap.

    The rest of a capped share goes to the others in proportion; rounding leftovers go to the largest remainders.

    Args:
        total: the budget.
        weights: finite, at least 0; when all remaining ones are 0, the caps are the weights.
        caps: the maximal share of each.

    Returns:
        One integer per weight, with sum ``min(total, sum(caps))``.

    Raises:
        ValueError: if the numbers of weights and caps differ, or a weight is negative or not finite.
    """
    if len(weights) != len(caps):
        raise ValueError(f"share_out needs one cap per weight: got {len(caps)} caps for {len(weights)} weights.")
    if any(not 0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"Weights must be finite numbers of at least 0, got {list(weights)}.")
    out = [0] * len(weights)
    left = min(total, sum(caps))
    unfilled = [i for i, cap in enumerate(caps) if cap > 0]
    while unfilled:
        largest = max(weights[i] for i in unfilled)
        parts = {i: weights[i] / largest if largest > 0 else float(caps[i]) for i in unfilled}
        factor = left / sum(parts.values())
        full = [i for i in unfilled if parts[i] * factor >= caps[i]]
        if not full:
            break
        for i in full:
            out[i] = caps[i]
            left -= caps[i]
        unfilled = [i for i in unfilled if i not in set(full)]
    if unfilled:
        exact = {i: parts[i] * factor for i in unfilled}
        for i in unfilled:
            out[i] = int(exact[i])
        rest = left - sum(out[i] for i in unfilled)
        for i in sorted(unfilled, key=lambda i: (out[i] - exact[i], i))[:rest]:
            out[i] += 1
    return out
