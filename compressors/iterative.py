"""LLMLingua as published: contexts are chosen by perplexity, then tokens window by window on the compressed prefix.

This is the computation of arXiv 2310.05736 and 2310.06839 as their authors' release carries it out, for the ``faithful``
modes. Its peculiarities are part of it:

- whether a token stays is decided by the loss of the token *after* it;
- the threshold of a window is taken over the losses of the whole text, what was kept and what is still to come included;
- the first window is one token short, a last window shorter than ``size`` is left whole, and so is (almost) a text that
  is shorter than ``size``;
- losses that equal the threshold are dropped, so a text of one repeated token loses nearly everything;
- contexts are read without BOS, though the lengths that the budget is made of count it.

Left out: sentence filtering, kept separators, other rankers, and the sliding cache for texts beyond the model's positions,
which are refused here. Strings of special tokens in a text are plain text. A window is scored by reading the compressed
prefix again, which gives what the cached prefix gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Span, merge
from .context_budget import CONDITIONS, REORDERS, check_length, choose_contexts, rank_contexts, token_counts
from .reader import Reader
from .scoring import next_token_losses

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
        spans: the kept ``(start, end)`` characters of the taken contexts joined by blank lines.
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
    extra: float = 100.0,
    forced: Sequence[int] = (),
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
        extra: tokens added to the target when contexts are chosen.
        forced: indices of contexts that are taken in any case.

    Raises:
        ValueError: if an argument is none of these, a question is needed and missing, or the text is longer than the
            scorer's positions.
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
        fixed = sum(bos + n for n in token_counts(scorer, [instruction, question]))
        target = (fixed + sum(lengths)) * rate - fixed
    order, shifts = [0], [0.0]
    if len(contexts) > 1:
        asked = question if ranker == "longllmlingua" and condition != "none" else None
        ranks = rank_contexts(scorer, contexts, asked, condition)
        order, shifts = choose_contexts(
            ranks, lengths, target, extra=extra, reorder=reorder, shift=shift, forced=forced
        )
    taken = [contexts[i] for i in order]
    prefix = question + _SEPARATOR if compare else ""
    body = _SEPARATOR.join(taken)
    ids, offsets = scorer.prompts.encode_with_offsets(prefix + body, opens=True)
    start = sum(a < len(prefix) for a, _ in offsets)
    plan = window_plan([n + 2 for n in token_counts(scorer, taken)], target, size, shifts)
    kept = keep_tokens(scorer, ids, plan, size, start=start, compare=compare)
    text = scorer.decode([ids[i] for i in kept])
    text = text if text.strip() else ""
    spans = [(max(offsets[i][0] - len(prefix), 0), offsets[i][1] - len(prefix)) for i in kept]
    return PublishedPrompt(
        prompt=_SEPARATOR.join(part for part in (instruction, text, question) if part),
        text=text,
        order=tuple(order),
        shifts=tuple(shifts),
        spans=merge(body, spans),
        source_tokens=len(ids) - start,
        kept_tokens=len(kept),
    )


# -- tokens --------------------------------------------------------------------------------------------------------------


def window_plan(
    lengths: Sequence[int], target: float, size: int, shifts: Sequence[float]
) -> list[list[tuple[int, float]]]:
    """For each window its stretches ``(tokens, keep ratio)``; a window may span several contexts.

    Args:
        lengths: tokens of each context and 2 for what parts it from the next.
        target: tokens to keep; the common ratio is ``target / (sum(lengths) + 1)``.
        size: tokens of a window; the first has one less.
        shifts: added to the common ratio, which is then clamped to [0, 1].
    """
    common = target / (sum(lengths) + 1)
    plan: list[list[tuple[int, float]]] = []
    window: list[tuple[int, float]] = []
    filled = 1
    for length, shift in zip(lengths, shifts):
        ratio = max(min(1, common + shift), 0)
        if filled + length < size:
            window.append((length, ratio))
            filled += length
            continue
        plan.append([*window, (size - filled, ratio)])
        filled += length - size
        if filled > size:
            whole, filled = divmod(filled, size)
            plan += [[(size, ratio)]] * whole
        window = [(filled, ratio)] if filled else []
    return [*plan, window] if window else plan


def keep_tokens(
    scorer: Reader,
    ids: Sequence[int],
    plan: Sequence[Sequence[tuple[int, float]]],
    size: int,
    *,
    start: int = 0,
    compare: bool = False,
) -> list[int]:
    """Indices of the tokens that stay, without those of the prefix.

    Args:
        scorer: the causal LM.
        ids: prefix and text; no BOS.
        plan: see `window_plan`.
        size: tokens of a window.
        start: tokens of the prefix.
        compare: threshold the loss without the prefix minus the loss behind it, in place of the loss.
    """
    check_length(scorer, ids)
    tokens, alive = torch.tensor(ids, dtype=torch.long), torch.arange(len(ids))
    end = min(size + start, len(ids))
    behind = alone = torch.zeros(0)  # entry i belongs to token i: the loss of the token after it
    ready = ready_alone = 0
    for step, stretches in enumerate(plan):
        if end > len(tokens):
            break
        stop = end if step else len(tokens)
        found = next_token_losses(scorer, tokens[:stop].tolist())
        if not len(found):
            break
        behind = _renew(behind, found, ready) if step else found
        if compare:
            found = next_token_losses(scorer, tokens[start:stop].tolist())
            alone = _renew(alone, found, ready_alone) if step else found
        ready = 0 if start and not step else end - size
        ready_alone = 0 if start and not step else end - start - size
        for length, ratio in stretches:
            score = alone[: len(behind) - start] - behind[start:] if compare else behind
            over = score > _threshold(score, ratio)
            keep = torch.cat([behind[:start] > 0, over, behind[:1] > 0] if compare else [over, behind[:1] > 0])
            # These slices count from the end where they are negative, as they do in a text shorter than a window.
            border = end - size + length
            keep[border:] = True
            keep[: border - length] = True
            behind = behind[keep[:-1]]
            if compare:
                keep = _fit(keep, max(len(keep), len(alone) + start + 1))
                alone = alone[keep[start:-1]]
            keep = _fit(keep, len(tokens))
            tokens, alive = tokens[keep], alive[keep]
            end = border - int((~keep[:border]).sum()) + size
    return alive[start:].tolist()


def _renew(past: Tensor, found: Tensor, ready: int) -> Tensor:
    """The losses known so far with those from ``ready`` on measured anew."""
    past = torch.cat([past, torch.zeros(max(0, len(found) - len(past)))])
    past[ready : len(found)] = found[ready:]
    return past


def _threshold(losses: Tensor, ratio: float) -> float:
    """The loss at rank ``int(n * ratio) - 1``, from the largest down."""
    if ratio == 1.0 or not len(losses):
        return float("-inf")
    rank = max(0, min(len(losses) - 1, int(len(losses) * ratio) - 1))
    return float(losses.sort(descending=True).values[rank])


def _fit(keep: Tensor, length: int) -> Tensor:
    """Cut to a length, or filled up with tokens that stay."""
    return torch.cat([keep, torch.ones(max(0, length - len(keep)), dtype=torch.bool)])[:length]
