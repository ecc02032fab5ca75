"""LLMLingua's coarse budget as published: which contexts are read at all, in which order, and how hard each is compressed."""

from __future__ import annotations

from collections.abc import Sequence

from .reader import Reader
from .scoring import next_token_losses

REORDERS = ("original", "two_stage", "sort")
STATEMENT = " We can get the answer to this question in the given documents."
_NEGATIVE_BUDGET = 100  # what contexts are chosen for where instruction and question alone exceed the target


def context_losses(scorer: Reader, contexts: Sequence[str], question: str | None = None) -> list[float]:
    """Mean loss of each context behind BOS; or, given a question, that of the question and `STATEMENT` right after it.

    Context and question are tokenised as one string; the question's losses begin after as many tokens as the context has
    alone. An empty mean counts as 0.
    """
    out = []
    for context in contexts:
        ids = scorer.bos_ids + scorer.prompts.encode(context + (question + STATEMENT if question else ""), opens=True)
        check_length(scorer, ids)
        losses = next_token_losses(scorer, ids)
        if question:
            losses = losses[max(len(scorer.bos_ids) + token_counts(scorer, [context])[0] - 1, 0) :]
        out.append(float(losses.mean()) if len(losses) else 0.0)
    return out


def rank_contexts(scorer: Reader, contexts: Sequence[str], question: str | None = None) -> list[int]:
    """Indices of the contexts, the best first: by descending loss, or by ascending loss of the question given them."""
    losses = context_losses(scorer, contexts, question)
    sign = 1 if question else -1
    return sorted(range(len(losses)), key=lambda i: sign * losses[i])


def choose_contexts(
    ranks: Sequence[int],
    lengths: Sequence[int],
    target: float,
    *,
    extra: float = 100.0,
    reorder: str = "original",
    shift: float = 0.0,
) -> tuple[list[int], list[float]]:
    """The coarse budget: contexts in order of rank until the target (plus ``extra``) is spent, the crossing one included.

    Args:
        ranks: indices, the best first.
        lengths: tokens of each context, BOS included.
        target: tokens; a negative one counts as 100.
        extra, reorder, shift: see `iterative.compress_prompt`.

    Returns:
        The chosen indices as they will stand, and what is added to each one's keep ratio.
    """
    left = (target if target >= 0 else _NEGATIVE_BUDGET) + extra
    chosen = []
    for i in ranks:
        chosen.append(i)
        left -= lengths[i]
        if left < 0:
            break
    steps = len(chosen) - 1
    ramp = {i: shift * (1 - 2 * rank / steps) if steps else 0.0 for rank, i in enumerate(chosen)}
    order = reordered(chosen, reorder)
    return order, [ramp[i] for i in order]


def reordered(ranked: Sequence[int], how: str) -> list[int]:
    """Ranked indices as they are to stand: ``"original"``, ``"sort"`` (by rank) or ``"two_stage"`` (best at both ends)."""
    if how == "original":
        return sorted(ranked)
    if how == "two_stage":
        return [*ranked[::2], *reversed(ranked[1::2])]
    if how == "sort":
        return list(ranked)
    raise ValueError(f"reorder must be one of {REORDERS}, got {how!r}.")


def token_counts(scorer: Reader, texts: Sequence[str]) -> list[int]:
    """The scorer's tokens of each text that opens its prompt, BOS aside."""
    return [len(ids) for ids in scorer.prompts.encode_batch([(text, True) for text in texts])]


def check_length(scorer: Reader, ids: Sequence[int]) -> None:
    """Raises ``ValueError`` if a row is longer than the scorer's positions."""
    limit = scorer.max_positions
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"mode='faithful' reads a text at once: {len(ids)} tokens, but {scorer.name!r} has {limit} positions. Give "
            "fewer or shorter contexts, a scorer with more positions, or mode='fast'."
        )
