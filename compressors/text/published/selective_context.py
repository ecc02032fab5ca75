"""Selective Context as released (arXiv 2310.06201): drops a share of the units by a percentile of their self-information.

Known properties of the release, which are kept:

- White space is collapsed first. Each sentence is scored alone after the end-of-text token.
- Units *below* the percentile are dropped, so ties stay.
- Kept tokens and phrases are joined by nothing (sentences run together), sentences by a space; a dropped sentence leaves
  its space. A single kept token may be a broken character.
- A token across the end of a phrase counts for the phrase that it ends, not for the one that it begins.

Differences: phrases come from `split_units`, not from a parser's noun chunks; a character of several tokens stays whole in
its phrase; a sentence longer than the scorer's positions is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ...core.units import Span, split_units
from ...reader.reader import Reader
from ..scoring import row_losses

_SPACE = re.compile(r"\s+")
# After a full stop or a question mark, unless the stop belongs to an abbreviation such as "e.g." or "Dr."
_BORDER = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s")


def drop_predictable(scorer: Reader, text: str, share: float, unit: str = "phrase") -> str:
    """Drops the units with the lowest self-information.

    Args:
        scorer: the causal LM.
        text: the text.
        share: percentile (over the whole text) below which units are dropped, as a share.
        unit: ``"token"``, ``"phrase"`` or ``"sentence"``.

    Raises:
        ValueError: if a sentence is longer than the scorer's positions.
    """
    sentences = [s.strip() for s in _BORDER.split(_SPACE.sub(" ", text)) if s.strip()]
    pieces: list[str] = []
    values: list[float] = []
    for number, sentence in enumerate(sentences):
        found, worth = _units(scorer, sentence, unit, first=number == 0)
        pieces += found
        values += worth
    if not pieces:
        return ""
    limit = np.nanpercentile(values, 100 * share)
    kept = ["" if value < limit else piece for piece, value in zip(pieces, values)]
    return " ".join(kept) if unit == "sentence" else "".join(kept)


def _units(scorer: Reader, sentence: str, unit: str, first: bool) -> tuple[list[str], list[float]]:
    """A sentence's units as they are joined, and their mean self-information."""
    ids, offsets = scorer.prompts.encode_with_offsets(sentence, opens=True)
    opening = scorer.eos_id if scorer.eos_id is not None else next(iter(scorer.bos_ids), None)
    if opening is None:
        raise ValueError(f"{scorer.name!r} has neither an end-of-text nor a BOS token to read before a sentence.")
    if scorer.max_positions is not None and len(ids) + 1 > scorer.max_positions:
        raise ValueError(
            f"A sentence of {len(ids)} tokens is too long for {scorer.name!r} with {scorer.max_positions} positions; "
            "mode='fast' reads it in windows."
        )
    losses = row_losses(scorer, [[opening, *ids]])[0]
    if unit == "sentence":
        return [sentence], [float(losses.mean())]
    if unit == "token":
        return [scorer.decode([i]) for i in ids], losses.tolist()
    spans = split_units(sentence, unit, whole=False)
    # A phrase owns the space before it; the sentence's first phrase gets one unless it opens the text.
    phrases = [sentence[a:b] for a, b in spans]
    phrases[0] = phrases[0] if first else " " + phrases[0]
    return phrases, _phrase_values(sentence, spans, offsets, losses.tolist())


def _phrase_values(
    sentence: str, phrases: Sequence[Span], offsets: Sequence[Span], losses: Sequence[float]
) -> list[float]:
    """Mean self-information of each phrase; NaN for a phrase without tokens, which then stays.

    A token across the end of a phrase belongs in equal parts to the phrases that end in it. A lone space inside a phrase
    does not count.
    """
    found: list[list[float]] = [[] for _ in phrases]
    now = last = reached = 0
    for (_, end), loss in zip(offsets, losses):
        if end <= reached:  # the rest of a character
            found[last].append(loss)
            continue
        first = now
        while now < len(phrases) and phrases[now][1] <= end:
            now += 1
        if now > first:
            for phrase in range(first, now):
                found[phrase].append(loss / (now - first))
        elif sentence[reached:end] != " ":
            found[now].append(loss)
        last, reached = max(now - 1, first), end
    return [float(np.mean(own)) if own else float("nan") for own in found]
