"""LLMLingua's coarse budget as published: which contexts are read at all, in which order, and how hard each is compressed."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

from ...reader.reader import Reader
from ..scoring import row_losses

CONDITIONS = ("after", "before", "none")
REORDERS = ("original", "two_stage", "sort")
STATEMENT = " We can get the answer to this question in the given documents."
_STEP = re.compile(r"\s*([-+*/])\s*(\d+(?:\.\d*)?|\.\d+)\s*")
_STEPS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_NEGATIVE_BUDGET = 100  # what contexts are chosen for where instruction and question alone exceed the target


def context_losses(
    scorer: Reader,
    contexts: Sequence[str],
    question: str | None = None,
    condition: str = "after",
    statement: str = STATEMENT,
) -> list[float]:
    """Mean loss of each context behind BOS; or, given a question, that of what comes second: question or context.

    Context and question are tokenised as one string; the losses begin after as many tokens as what comes first has alone.
    An empty mean counts as 0.

    Args:
        scorer: the causal LM.
        contexts: the contexts.
        question: the statement follows it.
        condition: ``"after"``: the question stands right after the context; ``"before"``: right before it.
        statement: what is said behind the question.
    """
    asked = question + statement if question else ""
    pairs = [(asked, context) if condition == "before" else (context, asked) for context in contexts]
    encoded = scorer.prompts.encode_batch([(first + second, True) for first, second in pairs])
    rows = [scorer.bos_ids + ids for ids in encoded]
    for ids in rows:
        check_length(scorer, ids)
    found = row_losses(scorer, rows)
    if asked:
        starts = [max(len(scorer.bos_ids) + n - 1, 0) for n in token_counts(scorer, [first for first, _ in pairs])]
        found = [losses[start:] for losses, start in zip(found, starts)]
    return [float(losses.mean()) if len(losses) else 0.0 for losses in found]


def rank_contexts(
    scorer: Reader, contexts: Sequence[str], question: str | None = None, condition: str = "after"
) -> list[int]:
    """Indices of the contexts, the best first: by descending loss, or with a question by ascending `context_losses`."""
    losses = context_losses(scorer, contexts, question, condition)
    sign = 1 if question else -1
    return sorted(range(len(losses)), key=lambda i: sign * losses[i])


def choose_contexts(
    ranks: Sequence[int],
    lengths: Sequence[int],
    target: float,
    *,
    extra: float | str = 100.0,
    reorder: str = "original",
    shift: float = 0.0,
    forced: Sequence[int] = (),
) -> tuple[list[int], list[float]]:
    """The coarse budget: contexts in order of rank until the target (plus ``extra``) is spent, the crossing one included.

    Args:
        ranks: indices, the best first.
        lengths: tokens of each context, BOS included.
        target: tokens; a negative one counts as 100.
        extra, reorder, shift: see `iterative.compress_prompt`.
        forced: indices that are taken whatever they cost, and count as the best ones; they use up budget only where the
            ranks reach them.

    Returns:
        The chosen indices as they will stand, and what is added to each one's keep ratio.
    """
    left = widened(target if target >= 0 else _NEGATIVE_BUDGET, extra)
    chosen = list(dict.fromkeys(forced))
    for i in ranks:
        if i not in chosen:
            chosen.append(i)
        left -= lengths[i]
        if left < 0:
            break
    steps = len(chosen) - 1
    ramp = {i: shift * (1 - 2 * rank / steps) if steps else 0.0 for rank, i in enumerate(chosen)}
    order = reordered(chosen, reorder)
    return order, [ramp[i] for i in order]


def widened(target: float, extra: float | str) -> float:
    """A target with what is added to it: a number of tokens, or a step such as ``"+100"``, ``"*1.5"``, ``"-20"``, ``"/2"``.

    Raises:
        ValueError: for any other string, a division by zero, or a number that is not at least 0.
    """
    if not isinstance(extra, str):
        if not extra >= 0:
            raise ValueError(f"context_budget must be a number of at least 0, got {extra!r}.")
        return target + extra
    found = _STEP.fullmatch(extra)
    if found is None or (found[1] == "/" and float(found[2]) == 0):
        raise ValueError(f"context_budget is a number of tokens or a step such as '+100' or '*1.5', got {extra!r}.")
    return _STEPS[found[1]](target, float(found[2]))


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
