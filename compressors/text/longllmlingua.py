"""LongLLMLingua: tokens and passages are kept for what they have to do with a question."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ..core.config import CompressorConfig
from ..core.passage import CompressedPassage
from ..registry import register_compressor
from .llmlingua import LLMLinguaCompressor, LLMLinguaConfig
from .published.contexts import CONDITIONS, STATEMENT, reordered
from .scoring import BLANK_LINE, TokenScores, self_information
from .shares import share_out


@dataclass
class LongLLMLinguaConfig(LLMLinguaConfig):
    """Settings of LongLLMLingua. ``dynamic_ratio`` is 0 by default; the paper's examples use 0.25 to 0.3."""

    method: ClassVar[str] = "longllmlingua"

    question: str | None = field(
        default=None, metadata={"help": "the question where a call gives none: a fixed task, say"}
    )
    statement: str = field(
        default=STATEMENT, metadata={"help": "what follows the question where passages are ranked (fast)"}
    )
    condition: Literal["after", "before", "none"] = field(
        default="after",
        metadata={
            "help": "contexts are ranked by the question 'after' them, by themselves with it 'before' them, or by themselves "
            "('none') (faithful)"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition must be one of {CONDITIONS}, got {self.condition!r}.")
        if self.question is not None and not self.question.strip():
            raise ValueError("question must be a text, or None where every call gives one; got an empty one.")


@register_compressor
class LongLLMLinguaCompressor(LLMLinguaCompressor):
    """Keeps the tokens that a question makes more likely (LongLLMLingua, arXiv 2310.06839).

    A token's score is its contrastive perplexity, ``-log p(token | before) + log p(token | question, before)``.

    ``mode="fast"``: both terms from one pass each over all passages, in batches of like length, and an exact budget for
    each passage. With ``dynamic_ratio`` r above 0 the passages of a call that share a question are ranked by its loss
    (read behind each passage in the pass that has no question before it) and their keep ratios run from +r to -r around
    the common one, the total staying exactly what it was; the results stay in the caller's order, ``info["rank"]`` holds
    each one's rank (0 is the best) and `reorder` puts them in order.

    ``mode="faithful"``: the published computation (see `iterative`), each passage on its own; `compress_prompt` runs it
    over a list of contexts, ranking, order and dynamic ratios included.

    Every call needs a question, or the config one: a ``ValueError`` otherwise.
    """

    config_class: ClassVar[type[CompressorConfig]] = LongLLMLinguaConfig
    config: LongLLMLinguaConfig
    query_aware: bool = True

    def _question(self, query: str | None) -> str:
        found = query if query is not None and query.strip() else self.config.question
        if found is None:
            raise ValueError(
                "LongLLMLingua compresses for a question and got none: pass query=..., set the config's question, or use "
                "llmlingua, which needs none."
            )
        return found

    # -- fast ------------------------------------------------------------------------------------------------------

    def score(self, texts: Sequence[str], queries: Sequence[str | None] | None = None) -> list[TokenScores]:
        """The contrastive perplexity in nats of every token (of the scorer) of every text.

        Args:
            texts: the texts.
            queries: one question a text.

        Raises:
            ValueError: if a text has no question.
        """
        questions = [self._question(query) for query in queries or [None] * len(texts)]
        alone = self._alone(texts, questions if self.config.dynamic_ratio else None)
        prefixes = [question + BLANK_LINE for question in questions]
        asked = self_information(self.scorer, texts, prefixes=prefixes, window=self.config.window)
        return [TokenScores(a.ids, a.offsets, a.nll - b.nll, a.ending) for a, b in zip(alone, asked)]

    def _alone(self, texts: Sequence[str], questions: Sequence[str] | None) -> list[TokenScores]:
        """The loss without a question; and, given questions, that of each question behind its text, from the same pass."""
        endings = None if questions is None else [question + self.config.statement for question in questions]
        return self_information(self.scorer, texts, endings=endings, window=self.config.window)

    def rank(self, texts: Sequence[str], query: str | None = None) -> list[int]:
        """Indices of passages, the one that makes the question most likely first; ties keep the caller's order.

        Raises:
            ValueError: without a question.
        """
        losses = self.rank_losses(texts, query)
        return sorted(range(len(losses)), key=lambda i: losses[i])

    def rank_losses(self, texts: Sequence[str], query: str | None = None) -> list[float]:
        """Mean loss in nats of the question and the statement after it, given each passage: the lower, the more relevant.

        A passage that does not fit the scorer's window beside the question is read in several, and its best part counts.
        An empty one has an infinite loss.
        """
        question = self._question(query)
        with self._lock, torch.no_grad():
            found = self._alone(self._check_texts(texts), [question] * len(texts))
        return [math.inf if scores.ending is None else scores.ending for scores in found]

    @property
    def pools_budget(self) -> bool:
        """Dynamic ratios, or shares by score, divide the budget of a call anew."""
        return self.config.dynamic_ratio > 0 or super().pools_budget

    def share_budget(
        self,
        texts: Sequence[str],
        queries: Sequence[str | None],
        lengths: Sequence[int],
        targets: Sequence[int],
        found: Mapping[int, TokenScores],
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Targets by rank among the passages with the same question: the published ramp, scaled to the same total."""
        if not self.config.dynamic_ratio:
            return super().share_budget(texts, queries, lengths, targets, found)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, query in enumerate(queries):
            groups[self._question(query)].append(i)
        out = list(targets)
        notes: list[dict[str, Any]] = [{} for _ in texts]
        for group in groups.values():
            # Scoring has read the question behind each passage; one that is empty was not scored.
            losses = {i: found[i].ending if i in found else None for i in group}
            order = sorted(group, key=lambda i: math.inf if (loss := losses[i]) is None else loss)
            weights, caps, total = [], [], 0
            for rank, i in enumerate(order):
                notes[i] = {"rank": rank}
                shift = self.config.dynamic_ratio * (1 - 2 * rank / (len(order) - 1)) if len(order) > 1 else 0.0
                rate = min(targets[i] / lengths[i], 1.0) if lengths[i] else 0.0
                # The ramp would give a part of nothing to a passage that is to keep nothing.
                weights.append(lengths[i] * min(max(rate + shift, 0.0), 1.0) if targets[i] else 0.0)
                caps.append(lengths[i] if targets[i] else 0)
                total += min(targets[i], lengths[i])
            for i, share in zip(order, share_out(total, weights, caps)):
                out[i] = share
        return out, notes

    # -- faithful --------------------------------------------------------------------------------------------------

    def _published(self) -> dict[str, Any]:
        return {"ranker": "longllmlingua", "condition": self.config.condition, "compare": True}

    def _compress(
        self, texts: list[str], queries: list[str | None], ratio: float | None, *, vectors: Any, **options: Any
    ) -> list[CompressedPassage]:
        questions: list[str | None] = [self._question(query) for query in queries]
        return super()._compress(texts, questions, ratio, vectors=vectors, **options)


def reorder(passages: Sequence[CompressedPassage], how: str = "sort") -> list[CompressedPassage]:
    """Compressed passages in the order in which a reader uses them best.

    Args:
        passages: of one call with ``dynamic_ratio`` above 0, so that ``info["rank"]`` is there.
        how: ``"sort"``: the best first; ``"two_stage"``: the best at both ends; ``"original"``: as given.

    Raises:
        ValueError: if a passage has no rank, or for any other ``how``.
    """
    if how == "original":
        return list(passages)
    if any("rank" not in passage.info for passage in passages):
        raise ValueError('A passage has no info["rank"]: compress them in one call with dynamic_ratio above 0.')
    ranked = sorted(range(len(passages)), key=lambda i: passages[i].info["rank"])
    return [passages[i] for i in reordered(ranked, how)]
