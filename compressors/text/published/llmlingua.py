"""LLMLingua and LongLLMLingua as released (arXiv 2310.05736, 2310.06839): contexts, sentences and tokens are dropped.

Known properties of the release, which are kept:

- The loss of the token *after* a token decides whether the token stays.
- The threshold of a window is taken over the losses of the whole text, including kept and future tokens.
- The first window is one token short. A last window shorter than ``iterative_size`` stays whole, and so does a text that
  is shorter than one.
- Losses equal to the threshold are dropped: a text of one repeated token loses nearly everything.
- Contexts are read without BOS, but the lengths for the budget count it.
- The first pass reads as much of the text as the model has positions, for its losses alone. Beyond the positions the
  oldest cached tokens after the first ten are dropped; other tokens keep their positions and losses.

Differences: other rankers are left out; special-token strings in a text are plain text; sentences come from `split_units`,
not from a downloaded splitter; no extra priority for first or last sentences, which the release adds with the wrong sign.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...core.config import CompressorConfig, added, check_choices, check_counts
from ...core.textfiles import check_strings
from ...core.units import Span, split_units
from ...reader.reader import Reader
from ..budget import merge
from ..scoring import BLANK_LINE, row_losses
from .windows import keep_tokens, window_plan

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
_NEGATIVE_BUDGET = 100  # the budget if instruction and question alone exceed the target


@dataclass
class LLMLinguaOptions(CompressorConfig):
    """Options of LLMLingua's ``mode="published"``."""

    method: ClassVar[str] = "llmlingua"

    iterative_size: int = field(default=200, metadata={"help": "tokens per window (published)"})
    context_budget: float | str = field(
        default=100.0, metadata={"help": "tokens added to the target to choose contexts, or '*1.5' etc. (published)"}
    )
    reorder: Literal["original", "two_stage", "sort"] = field(
        default="original",
        metadata={"help": "order of chosen contexts: 'original', by rank ('sort'), best at both ends ('two_stage')"},
    )
    sentence_budget: float | None = added(
        None, "share of the target that whole sentences may take, 1.4 in the release; null: no filter (published)"
    )
    keep_split: bool = added(False, "adjacent line breaks stay (published)")
    token_filter: bool = added(True, "drop tokens of the chosen contexts and sentences (published)")

    def __post_init__(self) -> None:
        check_counts(self, {"iterative_size": 2})
        check_choices(self, {"reorder": REORDERS})
        widened(0.0, self.context_budget)
        if self.sentence_budget is not None and not self.sentence_budget > 0:
            raise ValueError(f"sentence_budget must be a number above 0 or null, got {self.sentence_budget!r}.")


@dataclass
class LongLLMLinguaOptions(LLMLinguaOptions):
    """Options of LongLLMLingua's ``mode="published"``."""

    method: ClassVar[str] = "longllmlingua"

    condition: Literal["after", "before", "none"] = field(
        default="after",
        metadata={
            "help": "rank contexts by the question read 'after' them, by their own loss with the question 'before' them, or "
            "without it ('none') (published)"
        },
    )
    add_instruction: bool = added(
        False, "the instruction follows the question that tokens are compared with (published)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"condition": CONDITIONS})


@dataclass(frozen=True)
class PublishedPrompt:
    """Result of `compress_prompt`.

    Attributes:
        prompt: instruction, compressed contexts and question, joined by blank lines.
        text: the compressed contexts, decoded from the kept tokens (a character may be broken).
        order: indices of the chosen contexts, in their order in the text.
        shifts: what was added to the keep ratio of each.
        spans: kept ``(start, end)`` characters of the chosen contexts (after the sentence filter) joined by blank lines.
        source_tokens, kept_tokens: the scorer's tokens of the joined contexts, and the kept ones.
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
    options: LLMLinguaOptions,
    *,
    rate: float = 0.5,
    target: float | None = None,
    instruction: str = "",
    question: str = "",
    shift: float = 0.0,
    forced: Sequence[int] = (),
    append_question: bool = True,
) -> PublishedPrompt:
    """Compresses contexts to ``rate`` of all tokens, including instruction and question.

    With `LongLLMLinguaOptions` contexts are ranked by the question, and tokens are kept by how much the question before
    them lowers their loss. Otherwise contexts and tokens with the highest losses stay.

    ``rate`` (kept tokens over all tokens) lies in (0, 1]; a ``target`` in tokens replaces it. Keep ratios run from ``+shift``
    to ``-shift`` around the common one, by rank. See `LLMLinguaCompressor.compress_prompt` for the other arguments.

    Raises:
        ValueError: if an argument is invalid, a question is missing, a ranked context is longer than the scorer's
            positions, or these are too few for windows to slide over a longer text.
    """
    contexts = check_strings("contexts", contexts, "contexts")
    if not contexts:
        raise ValueError("compress_prompt needs at least one context, got none.")
    check_indices("forced", forced, len(contexts))
    if target is None and not 0 < rate <= 1:
        raise ValueError(f"rate is kept tokens over all tokens, in (0, 1], got {rate!r}.")
    compare = isinstance(options, LongLLMLinguaOptions)
    condition = options.condition if isinstance(options, LongLLMLinguaOptions) else "none"
    if compare and not question:
        raise ValueError("LongLLMLingua ranks and compares by a question, but got none.")
    bos = len(scorer.bos_ids)
    lengths = [bos + n for n in token_counts(scorer, contexts)]
    if target is None:
        first, last = (bos + n for n in token_counts(scorer, [instruction, question]))
        target = (first + last + sum(lengths)) * rate - first - (last if append_question else 0)
    order, shifts = [0], [0.0]
    asked = question if condition != "none" else None
    if len(contexts) > 1:
        ranks = rank_contexts(scorer, contexts, asked, condition)
        order, shifts = choose_contexts(
            ranks,
            lengths,
            target,
            extra=options.context_budget,
            reorder=options.reorder,
            shift=shift,
            forced=forced,
        )
    taken = [contexts[i] for i in order]
    if options.sentence_budget is not None:
        taken = filter_sentences(
            scorer, taken, target, share=options.sentence_budget, question=asked, condition=condition
        )
    body = BLANK_LINE.join(taken)
    prefix = ""
    if compare and options.token_filter:
        more = isinstance(options, LongLLMLinguaOptions) and options.add_instruction
        prefix = question + BLANK_LINE + (instruction + BLANK_LINE if more else "")
    ids, offsets = scorer.prompts.encode_with_offsets(prefix + body, opens=True)
    start = sum(a < len(prefix) for a, _ in offsets)
    if options.token_filter:
        plan = window_plan([n + 2 for n in token_counts(scorer, taken)], target, options.iterative_size, shifts)
        split = _line_break(scorer) if options.keep_split else None
        kept = keep_tokens(scorer, ids, plan, options.iterative_size, start=start, compare=compare, split=split)
        text = scorer.decode([ids[i] for i in kept])
    else:
        kept, text = list(range(len(ids))), body
    text = text if text.strip() else ""
    spans = [(max(offsets[i][0] - len(prefix), 0), offsets[i][1] - len(prefix)) for i in kept]
    return PublishedPrompt(
        prompt=BLANK_LINE.join(part for part in (instruction, text, question if append_question else "") if part),
        text=text,
        order=tuple(order),
        shifts=tuple(shifts),
        spans=merge(body, spans),
        source_tokens=len(ids) - start,
        kept_tokens=len(kept),
    )


def check_indices(name: str, indices: Sequence[int], count: int) -> None:
    """Raises ``ValueError`` unless all are indices of contexts."""
    if bad := [i for i in indices if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < count]:
        raise ValueError(f"{name} must hold indices of the {count} contexts, from 0 on; got {bad[0]!r}.")


def _line_break(scorer: Reader) -> int:
    ids = scorer.tokenize("\n")
    if len(ids) != 1:
        raise ValueError(f"keep_split needs a line break to be one token; {scorer.name!r} makes {len(ids)} of it.")
    return ids[0]


# -- contexts ------------------------------------------------------------------------------------------------------------


def context_losses(
    scorer: Reader,
    contexts: Sequence[str],
    question: str | None = None,
    condition: str = "after",
    statement: str = STATEMENT,
) -> list[float]:
    """Mean loss of each context after BOS; with a question, the mean loss of the second part of the pair.

    Context and question are tokenised as one string. The losses begin after as many tokens as the first part has alone.
    An empty mean is 0.

    Args:
        scorer: the causal LM.
        contexts: the contexts.
        question: ``statement`` follows it.
        condition: ``"after"``: the question stands right after the context; ``"before"``: right before it.
        statement: text after the question.
    """
    contexts = check_strings("contexts", contexts, "contexts")
    asked = question + statement if question else ""
    pairs = [(asked, context) if condition == "before" else (context, asked) for context in contexts]
    rows = [scorer.bos_ids + ids for ids in scorer.prompts.encode_batch([(a + b, True) for a, b in pairs])]
    limit = scorer.max_positions
    if limit is not None and (longest := max(map(len, rows), default=0)) > limit:
        raise ValueError(
            f"mode='published' reads a text at once: {longest} tokens, but {scorer.name!r} has {limit} positions. Give "
            "fewer or shorter contexts, a scorer with more positions, or mode='fast'."
        )
    found = row_losses(scorer, rows)
    if asked:
        starts = [max(len(scorer.bos_ids) + n - 1, 0) for n in token_counts(scorer, [first for first, _ in pairs])]
        found = [losses[start:] for losses, start in zip(found, starts)]
    return [float(losses.mean()) if len(losses) else 0.0 for losses in found]


def rank_contexts(
    scorer: Reader, contexts: Sequence[str], question: str | None = None, condition: str = "after"
) -> list[int]:
    """Indices of the contexts, best first: by descending loss, or with a question by ascending `context_losses`."""
    losses = context_losses(scorer, contexts, question, condition)
    return sorted(range(len(losses)), key=lambda i: losses[i] if question else -losses[i])


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
    """Takes contexts by rank until the target plus ``extra`` is spent, including the one that crosses it.

    Args:
        ranks: indices, best first.
        lengths: tokens of each context, BOS included.
        target: tokens; a negative one counts as 100.
        extra, reorder, shift: see `LLMLinguaOptions` and `compress_prompt`.
        forced: indices that are always taken and rank first; they spend budget only where the ranks reach them.

    Returns:
        The chosen indices in their final order, and what is added to the keep ratio of each.
    """
    chosen = list(dict.fromkeys(forced))
    chosen += [i for i in _within(ranks, lengths, widened(_positive(target), extra)) if i not in chosen]
    steps = len(chosen) - 1
    ramp = {i: shift * (1 - 2 * rank / steps) if steps else 0.0 for rank, i in enumerate(chosen)}
    order = reordered(chosen, reorder)
    return order, [ramp[i] for i in order]


def _positive(target: float) -> float:
    return target if target >= 0 else _NEGATIVE_BUDGET


def _within(ranks: Sequence[int], lengths: Sequence[int], budget: float) -> list[int]:
    """Indices by rank until the budget is spent, including the one that crosses it."""
    taken: list[int] = []
    for i in ranks:
        taken.append(i)
        budget -= lengths[i]
        if budget < 0:
            break
    return taken


def widened(target: float, extra: float | str) -> float:
    """Adds ``extra`` to a target: a number of tokens, or a step such as ``"+100"``, ``"*1.5"``, ``"-20"``, ``"/2"``.

    Raises:
        ValueError: for any other string, a division by zero, or a number below 0.
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
    """Final order of ranked indices: ``"original"``, ``"sort"`` (by rank) or ``"two_stage"`` (best at both ends)."""
    if how == "original":
        return sorted(ranked)
    if how == "two_stage":
        return [*ranked[::2], *reversed(ranked[1::2])]
    if how == "sort":
        return list(ranked)
    raise ValueError(f"reorder must be one of {REORDERS}, got {how!r}.")


def token_counts(scorer: Reader, texts: Sequence[str]) -> list[int]:
    """The scorer's tokens of each text at the start of a prompt, without BOS."""
    return [len(ids) for ids in scorer.prompts.encode_batch([(text, True) for text in check_strings("texts", texts)])]


# -- sentences -----------------------------------------------------------------------------------------------------------


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it; joined they are the text."""
    cuts = [a + len(text[a:b]) - len(text[a:b].lstrip()) for a, b in split_units(text, "sentence", whole=False)][1:]
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
    """Drops the sentences beyond the budget; sentences of all contexts compete, and the one that crosses it stays.

    Args:
        scorer: the causal LM.
        contexts: the chosen contexts.
        target: tokens of the compressed contexts; a negative one counts as 100.
        share: of the target, for all sentences together.
        question: rank sentences by it; ``None``: by their own loss, highest first.
        condition: as in `context_losses`.

    Raises:
        ValueError: if a sentence is longer than the scorer's positions.
    """
    split = [sentences_of(context) for context in check_strings("contexts", contexts, "contexts")]
    flat = [sentence for sentences in split for sentence in sentences]
    if len(flat) < 2:
        return list(contexts)
    losses = context_losses(scorer, flat, question, condition, statement="")
    ranks = sorted(range(len(flat)), key=lambda i: losses[i] if question else -losses[i])
    lengths = [len(scorer.bos_ids) + n for n in token_counts(scorer, flat)]
    kept = set(_within(ranks, lengths, share * _positive(target)))
    numbers = iter(range(len(flat)))
    return ["".join(sentence for sentence in sentences if next(numbers) in kept) for sentences in split]
