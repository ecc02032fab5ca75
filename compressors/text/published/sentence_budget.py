"""LLMLingua's sentence filter as published: between choosing contexts and dropping tokens, whole sentences may go.

Sentences of all chosen contexts compete by their perplexity (LLMLingua: the highest first) or by how likely they make the
question (LongLLMLingua: the lowest loss first). Not as published: sentences are those of `split_units` in place of a
downloaded splitter's. Left out: extra priority for the first or last sentences, which the release adds with a sign that
drops them first.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...core.units import split_units
from ...reader.reader import Reader
from .contexts import context_losses, token_counts

_NEGATIVE_BUDGET = 100  # as for contexts


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, white space going with what comes before it; joined they are the text."""
    cuts = [a + len(text[a:b]) - len(text[a:b].lstrip()) for a, b in split_units(text, "sentence")][1:]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])] if text else []


def filter_sentences(
    scorer: Reader,
    contexts: Sequence[str],
    target: float,
    *,
    share: float = 1.4,
    question: str | None = None,
    condition: str = "after",
) -> list[str]:
    """Contexts without the sentences that the budget has no room for, the crossing one included.

    Args:
        scorer: the causal LM.
        contexts: those that were chosen.
        target: tokens that the contexts should be compressed to; a negative one counts as 100.
        share: of the target, that sentences may take together.
        question: sentences are ranked by it; ``None``: by their own perplexity.
        condition: as in `context_losses`.

    Raises:
        ValueError: if a sentence is longer than the scorer's positions.
    """
    split = [sentences_of(context) for context in contexts]
    flat = [sentence for sentences in split for sentence in sentences]
    if len(flat) < 2:
        return list(contexts)
    losses = context_losses(scorer, flat, question, condition, statement="")
    sign = 1 if question else -1
    lengths = [len(scorer.bos_ids) + n for n in token_counts(scorer, flat)]
    left = share * (target if target >= 0 else _NEGATIVE_BUDGET)
    kept: set[int] = set()
    for i in sorted(range(len(flat)), key=lambda i: sign * losses[i]):
        kept.add(i)
        left -= lengths[i]
        if left < 0:
            break
    numbers = iter(range(len(flat)))
    return ["".join(sentence for sentence in sentences if next(numbers) in kept) for sentences in split]
