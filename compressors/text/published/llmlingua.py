"""LLMLingua as published: contexts are chosen by perplexity, then tokens window by window on the compressed prefix.

This is the computation of arXiv 2310.05736 and 2310.06839 as their authors' release carries it out, for the ``faithful``
modes. Its peculiarities are part of it:

- whether a token stays is decided by the loss of the token *after* it;
- the threshold of a window is taken over the losses of the whole text, what was kept and what is still to come included;
- the first window is one token short, a last window shorter than ``size`` is left whole, and so is (almost) a text that
  is shorter than ``size``;
- losses that equal the threshold are dropped, so a text of one repeated token loses nearly everything;
- contexts are read without BOS, though the lengths that the budget is made of count it.

- the first pass reads as much of the text as the model has positions, for its losses alone;
- beyond the model's positions the oldest of the cached tokens go, all but the first ten; the positions of the rest
  stay as they were, and the losses known so far are not moved along.

Left out: other rankers. Strings of special tokens in a text are plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...reader.reader import Reader
from ..budget import Span, merge
from .contexts import CONDITIONS, REORDERS, choose_contexts, rank_contexts, token_counts
from .sentence_budget import filter_sentences
from .windows import keep_tokens, window_plan

RANKERS = ("llmlingua", "longllmlingua")
_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PublishedPrompt:
    """What the published pipeline makes of a list of contexts.

    Attributes:
        prompt: instruction, compressed contexts and question, joined by blank lines.
        text: the compressed contexts, decoded from the kept tokens (a character may be broken).
        order: indices of the contexts that were taken, as they stand in the text.
        shifts: what was added to each one's keep ratio.
        spans: the kept ``(start, end)`` characters of the taken contexts, as the sentence filter leaves them, joined by
            blank lines.
        source_tokens, kept_tokens: the scorer's tokens of the joined contexts, and how many of them were kept.
    """

    prompt: str
    text: str
    order: tuple[int, ...]
    shifts: tuple[float, ...]
    spans: tuple[Span, ...]
    source_tokens: int
    kept_tokens: int


def compress_prompt(
    scorer: Reader,
    contexts: Sequence[str],
    *,
    rate: float = 0.5,
    target: float | None = None,
    instruction: str = "",
    question: str = "",
    ranker: str = "llmlingua",
    condition: str = "after",
    compare: bool = False,
    reorder: str = "original",
    shift: float = 0.0,
    size: int = 200,
    extra: float | str = 100.0,
    forced: Sequence[int] = (),
    append_question: bool = True,
    sentences: float | None = None,
    keep_split: bool = False,
) -> PublishedPrompt:
    """Compresses contexts to ``rate`` of all tokens, instruction and question included.

    Args:
        scorer: the causal LM.
        contexts: at least one.
        rate: kept tokens over all tokens, in (0, 1].
        target: tokens that the contexts should be compressed to, in place of a rate.
        instruction, question: they stand before and after the contexts and are not compressed.
        ranker: ``"llmlingua"``: contexts that surprise most come first; ``"longllmlingua"``: those that make the question
            most likely.
        condition: for ``"longllmlingua"`` alone: ``"after"``: the question is measured after the context; ``"before"``: the
            context after the question, and the one that it makes most likely comes first; ``"none"``: as ``"llmlingua"``,
            which is also what the release does if it is given ``condition_compare`` and no condition.
        compare: tokens are kept by how much the question in front lowers their loss (LongLLMLingua).
        reorder: order in the result: ``"original"``, by rank (``"sort"``), or best at both ends (``"two_stage"``).
        shift: ``r``: keep ratios run from ``+r`` to ``-r`` around the common one, by rank.
        size: tokens of a window.
        extra: tokens added to the target when contexts are chosen, or a step such as ``"*1.5"`` (`context_budget.widened`).
        forced: indices of contexts that are taken in any case.
        append_question: the question ends the prompt, and its tokens are part of what is to be kept.
        sentences: whole sentences go before tokens do, until the rest takes this share of the target (the release: 1.4);
            ``None``: no sentence filter.
        keep_split: line breaks side by side stay.

    Raises:
        ValueError: if an argument is none of these, a question is needed and missing, a context that is ranked is longer
            than the scorer's positions, or these are too few for windows to slide over a longer text.
    """
    if not contexts:
        raise ValueError("compress_prompt needs at least one context, got none.")
    if ranker not in RANKERS or reorder not in REORDERS:
        raise ValueError(f"ranker is one of {RANKERS} and reorder one of {REORDERS}; got {ranker!r} and {reorder!r}.")
    if condition not in CONDITIONS:
        raise ValueError(f"condition is one of {CONDITIONS}, got {condition!r}.")
    if bad := [i for i in forced if not isinstance(i, int) or not 0 <= i < len(contexts)]:
        raise ValueError(f"forced holds indices of the {len(contexts)} contexts, from 0 on; got {bad[0]!r}.")
    if (compare or ranker == "longllmlingua") and not question:
        raise ValueError("LongLLMLingua ranks and compares by a question, and got none.")
    if target is None and not 0 < rate <= 1:
        raise ValueError(f"rate is kept tokens over all tokens, in (0, 1], got {rate!r}.")
    bos = len(scorer.bos_ids)
    lengths = [bos + n for n in token_counts(scorer, contexts)]
    if target is None:
        first, last = (bos + n for n in token_counts(scorer, [instruction, question]))
        target = (first + last + sum(lengths)) * rate - first - (last if append_question else 0)
    order, shifts = [0], [0.0]
    asked = question if ranker == "longllmlingua" and condition != "none" else None
    if len(contexts) > 1:
        ranks = rank_contexts(scorer, contexts, asked, condition)
        order, shifts = choose_contexts(
            ranks, lengths, target, extra=extra, reorder=reorder, shift=shift, forced=forced
        )
    taken = [contexts[i] for i in order]
    if sentences is not None:
        taken = filter_sentences(scorer, taken, target, share=sentences, question=asked, condition=condition)
    prefix = question + _SEPARATOR if compare else ""
    body = _SEPARATOR.join(taken)
    ids, offsets = scorer.prompts.encode_with_offsets(prefix + body, opens=True)
    start = sum(a < len(prefix) for a, _ in offsets)
    plan = window_plan([n + 2 for n in token_counts(scorer, taken)], target, size, shifts)
    split = _line_break(scorer) if keep_split else None
    kept = keep_tokens(scorer, ids, plan, size, start=start, compare=compare, split=split)
    text = scorer.decode([ids[i] for i in kept])
    text = text if text.strip() else ""
    spans = [(max(offsets[i][0] - len(prefix), 0), offsets[i][1] - len(prefix)) for i in kept]
    return PublishedPrompt(
        prompt=_SEPARATOR.join(part for part in (instruction, text, question if append_question else "") if part),
        text=text,
        order=tuple(order),
        shifts=tuple(shifts),
        spans=merge(body, spans),
        source_tokens=len(ids) - start,
        kept_tokens=len(kept),
    )


def _line_break(scorer: Reader) -> int:
    ids = scorer.tokenize("\n")
    if len(ids) != 1:
        raise ValueError(f"keep_split needs a line break to be one token; {scorer.name!r} makes {len(ids)} of it.")
    return ids[0]
